"use strict";
// Blinded trials: which of two pictures is nearer to the seen one. Answers are kept here and saved as a file.
const data = JSON.parse(document.getElementById("rating-data").textContent);
const at = name => document.getElementById(name);
const KEPT = `rating ${data.page}`;
let sides = kept();  // the answers so far, in the order of the trials

function kept() {
  try { return JSON.parse(localStorage.getItem(KEPT)) ?? []; } catch { return []; }  // a browser may refuse
}

function keep() {
  try { localStorage.setItem(KEPT, JSON.stringify(sides)); } catch { /* then a reload starts over */ }
}

function answers() {
  return { page: data.page, rater: at("rater").value.trim(), trials: sides.map((side, trial) => ({ trial, side })) };
}

function show() {
  const trial = data.trials[sides.length], done = trial === undefined;
  at("trial").hidden = done;
  at("done").hidden = !done;
  if (!done) {
    at("seen").src = trial.seen;
    for (const side of ["left", "right"]) at(side).querySelector("img").src = trial[side];
    const next = data.trials[sides.length + 1];
    if (next) for (const file of Object.values(next)) new Image().src = file;  // ready when it is asked for
  }
  at("progress").value = sides.length;
  at("count").textContent = `${sides.length} of ${data.trials.length} answered`;
  at("back").disabled = at("save").disabled = sides.length === 0;
}

function choose(side) {
  if (sides.length === data.trials.length) return;
  sides.push(side);
  keep();
  show();
}

function goBack() {
  sides.pop();
  keep();
  show();
}

for (const side of ["left", "right"]) at(side).addEventListener("click", () => choose(side));
at("back").addEventListener("click", goBack);
at("save").addEventListener("click", () => {
  const name = at("rater").value.trim().replace(/[^\p{L}\p{N}]+/gu, "_");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(answers(), null, 1)], { type: "application/json" }));
  link.download = `ratings_${data.page}${name && `_${name}`}.json`;
  link.click();
});
document.addEventListener("keydown", event => {
  if (event.repeat || event.target === at("rater")) return;
  if (event.key === "ArrowLeft") choose("left");
  else if (event.key === "ArrowRight") choose("right");
  else if (event.key === "Backspace" && sides.length) goBack();
});
show();
