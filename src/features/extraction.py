"""Features that are missing, block by block: read ahead by other processes, computed, written while the next is.

Letters: N images, b images of a block.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader

import utils
from features.files import FeatureFile, check_room, create_file, rows_there
from nsd.trials import load_trials


def extract(maker, paths, team, subjects=None, dtype="float16", num_workers=2, overwrite=False, file_of=None):
    """Write what the files of maker's features lack of the images that the subjects saw, shared among the team.

    maker: see features.makers; subjects: None for all images; dtype: of a new file; overwrite: replace what is there;
    file_of: feature -> its file, where these are not the features of NSD's images, which paths.feature names.
    """
    of_nsd, file_of = file_of is None, file_of or paths.feature
    n_images, wanted = len(maker), wanted_images(paths, subjects, len(maker))
    there = {feat: None if overwrite else rows_there(file_of(feat), maker, wanted, dtype, team.print)
             for feat in maker.feats}
    maker.feats = [feat for feat in maker.feats if there[feat] is None or not there[feat][wanted].all()]
    if not maker.feats:
        return
    missing = {feat: len(wanted) - (0 if there[feat] is None else there[feat][wanted].sum()) for feat in maker.feats}
    team.print(f"{' '.join(missing)}: to compute for {max(missing.values())} images, by {maker.model}")
    network = maker.load()
    row_shape = maker.row_shape(network)
    needed = sum(missing.values()) * np.prod(row_shape) * np.dtype(dtype).itemsize
    files = [file_of(feat) for feat in missing]
    check_room(files[0].parent, [file.name for file in files], needed)
    team.wait()  # until every process has looked
    for feat in missing:
        if there[feat] is None and team.is_main:
            if of_nsd:
                paths.components(feat).unlink(missing_ok=True)  # of the rows that are replaced
            create_file(file_of(feat), n_images, row_shape, dtype, maker)
    team.wait()
    files = {feat: FeatureFile(file_of(feat)) for feat in missing}
    # Blocks are cut from the wanted images, not from the missing ones, and computed whole: in its last digits a feature
    # depends on the batch it is computed in. So a run that was killed and continued gives what another would have.
    blocks = np.split(wanted, range(maker.block_size, len(wanted), maker.block_size))
    blocks = [ids for ids in blocks if not all(file.written[ids].all() for file in files.values())]
    team.wait()  # until every process has counted
    write_blocks(maker, network, team.take(blocks), files, num_workers, team.device, show=team.is_main)
    team.wait()
    for feat, file in files.items():
        team.print(f"{file.path}: wrote {missing[feat]} rows, {FeatureFile(file.path).written.sum()} of {n_images} are "
                   f"there, {dtype}")


def wanted_images(paths, subjects, n_images):
    """List the images that the subjects saw, in training or test, by ascending id; all images without subjects."""
    if not subjects:
        return np.arange(n_images)
    seen = [load_trials(paths, subj, split)["image_id"] for subj in subjects for split in ("train", "new_test")]
    ids = np.unique(np.concatenate(seen))
    if ids[-1] >= n_images:
        raise utils.UserError(f"{paths.data_path / 'wds'}: a trial shows image {ids[-1]} (from 0), but there are "
                              f"{n_images}; check that both are of one data set")
    return ids


@torch.inference_mode()
def write_blocks(maker, network, blocks, files, num_workers, device, show=True):
    """Compute the features of `blocks`, a list of (b,) image ids, and write them to `files` {feat: FeatureFile}.

    Other processes (num_workers) read ahead; a thread writes a block while the next one is computed. show: a bar.
    """
    on_gpu = device.type == "cuda"
    loader = DataLoader(blocks, batch_size=None, collate_fn=maker.read, num_workers=num_workers, pin_memory=on_gpu)
    bar = utils.progress(total=sum(map(len, blocks)), desc=" ".join(files), unit="image", disable=not show)
    with bar, ThreadPoolExecutor(1) as thread:
        writing = None
        for ids, item in zip(blocks, loader, strict=True):
            rows = {feat: features.flatten(1).to(files[feat].dtype)
                    for feat, features in maker.compute(network, item).items()}
            # a GPU has only been told what to do: the copy is queued behind it, and waited for by the thread
            rows = {feat: part.to("cpu", non_blocking=True) for feat, part in rows.items()}
            copied = torch.cuda.current_stream(device).record_event() if on_gpu else None
            if writing is not None:
                writing.result()  # so that no more than one block waits for a slow disk
            writing = thread.submit(write_block, files, ids, rows, copied)
            bar.update(len(ids))
        if writing is not None:
            writing.result()


def write_block(files, ids, rows, copied):
    """Write the rows {feat: (b, width)} of a block, once the GPU's event `copied` (or None) says that they are here."""
    if copied is not None:
        copied.synchronize()
    for feat, part in rows.items():
        files[feat].write(ids, part)
