"""ClipFeatures against the transformers model's own forward pass, watched by hooks."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

import utils
from models import ClipFeatures

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def tiny_config(blocks=4):
    return CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=blocks, num_attention_heads=2, image_size=16,
        patch_size=8, projection_dim=8,
    )


@pytest.fixture
def vision():
    torch.manual_seed(0)
    model = CLIPVisionModel(tiny_config()).eval()
    for parameter in model.parameters():  # the default initialisation leaves the blocks nearly without effect
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def hooked(model, pixels, layers):
    """Reference: run the whole model and catch what leaves mlp.fc2 of block k/2."""
    caught, handles = {}, []
    for k in layers:
        fc2 = model.encoder.layers[k // 2 - 1].mlp.fc2
        handles.append(fc2.register_forward_hook(lambda module, args, output, k=k: caught.update({k: output})))
    hidden_states = model(pixels, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return caught, hidden_states


def test_equals_hooked_model(vision):
    image = torch.rand(3, 3, 16, 16)
    features = ClipFeatures(vision, layers=(2, 6, 8))(image)
    expected, _ = hooked(vision, (image - MEAN) / STD, (2, 6, 8))
    assert list(features) == [2, 6, 8]
    for k, value in expected.items():
        assert features[k].shape == (3, 5, 16) and features[k].dtype == torch.float32
        torch.testing.assert_close(features[k], value)


def test_is_before_the_residual_add(vision):
    """Feature k is the difference of the block's output and the stream after its attention."""
    image = torch.rand(2, 3, 16, 16)
    _, hidden = hooked(vision, (image - MEAN) / STD, ())
    block = vision.encoder.layers[1]
    middle = hidden[1] + block.self_attn(block.layer_norm1(hidden[1]), attention_mask=None)[0]
    feature = ClipFeatures(vision, layers=(4,))(image)[4]
    torch.testing.assert_close(feature, hidden[2] - middle, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(feature, hidden[2], atol=1e-2)


def test_resizes_bilinearly_without_antialias(vision):
    """Down from 32 to 16, half-pixel centres fall between two pixels: the mean of each 2x2 square."""
    image = torch.rand(1, 3, 32, 32)
    squares = image.view(1, 3, 16, 2, 16, 2).mean(dim=(3, 5))
    features = ClipFeatures(vision, layers=(2,))
    torch.testing.assert_close(features.preprocess(image), (squares - MEAN) / STD, atol=1e-5, rtol=1e-5)
    # down by 4, antialiasing would average sixteen pixels; without it only the middle four count
    image = torch.rand(1, 3, 64, 64)
    middle = image.view(1, 3, 16, 4, 16, 4)[:, :, :, 1:3, :, 1:3].mean(dim=(3, 5))
    torch.testing.assert_close(features.preprocess(image), (middle - MEAN) / STD, atol=1e-5, rtol=1e-5)


def test_is_differentiable_wrt_the_image_only(vision):
    """The gradient equals a finite difference, also through the resize; the frozen model gets none."""
    features = ClipFeatures(vision, layers=(4,)).double()
    image = torch.rand(1, 3, 24, 24, dtype=torch.double, requires_grad=True)
    direction = torch.randn_like(image)

    def value(x):  # in double all the way: forward() rounds its result to float32
        caught, _ = hooked(vision, features.preprocess(x), (4,))
        return caught[4].square().sum()

    (gradient,) = torch.autograd.grad(features(image)[4].square().sum(), image)
    step = 1e-5
    with torch.no_grad():
        difference = (value(image + step * direction) - value(image - step * direction)) / (2 * step)
    assert torch.isclose((gradient * direction).sum(), difference, rtol=1e-4)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in vision.parameters())


def test_runs_only_the_blocks_it_needs(vision):
    ran = []
    for i, block in enumerate(vision.encoder.layers):
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    ClipFeatures(vision, layers=(4, 2))(torch.rand(1, 3, 16, 16))
    assert ran == [0, 1]


@pytest.mark.parametrize("layer", [3, 0, 10, -2])
def test_refuses_layers_that_do_not_exist(vision, layer):
    with pytest.raises(utils.UserError, match=f"CLIP layer {layer}: .* from 2 to 8"):
        ClipFeatures(vision, layers=(2, layer))


def test_from_pretrained(vision, tmp_path):
    vision.save_pretrained(tmp_path / "vision")
    image = torch.rand(1, 3, 16, 16)
    loaded = ClipFeatures.from_pretrained(tmp_path / "vision", layers=(2,))
    assert torch.equal(loaded(image)[2], ClipFeatures(vision, layers=(2,))(image)[2])
    with pytest.raises(utils.UserError, match="--clip_model .*nowhere"):
        ClipFeatures.from_pretrained(tmp_path / "nowhere")


def test_takes_a_model_with_projection():
    model = CLIPVisionModelWithProjection(tiny_config())
    image = torch.rand(1, 3, 16, 16)
    expected = ClipFeatures(model.vision_model, layers=(4,))(image)[4]
    assert torch.equal(ClipFeatures(model, layers=(4,))(image)[4], expected)
