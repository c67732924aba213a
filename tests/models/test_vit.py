import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ViTForImageClassification

from models.errors import ModelError
from models.vit import (
    build_vit,
    eval_mode,
    layer_features,
    layer_names,
    replace_head,
    set_head,
)

MakeVit = Callable[..., ViTForImageClassification]


def pixels(count: int, rng: torch.Generator) -> torch.Tensor:
    return torch.rand(count, 3, 15, 15, generator=rng) * 2 - 1


def test_parameter_count_is_the_published_one_of_vit_base() -> None:
    # 86,567,656 for ViT-B/16 at 224 px with 1000 classes: timm's results table (86.57 M) and the
    # `num_params` of torchvision's ViT_B_16_Weights.IMAGENET1K_V1.
    names = [str(label) for label in range(1000)]
    model = build_vit(224, 16, 768, 12, 12, 4.0, 0.0, num_labels=1000, label_names=names, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656


def test_the_mission_has_the_parameters_that_its_sizes_imply() -> None:
    names = ["0", "90", "180", "270"]
    model = build_vit(160, 16, 512, 8, 8, 4.0, 0.0, num_labels=4, label_names=names, seed=0)
    width, hidden = 512, 2048
    attention = 4 * (width * width + width)
    mlp = width * hidden + hidden + hidden * width + width
    embedding = 3 * 16 * 16 * width + width + width + 101 * width
    expected = embedding + 8 * (attention + mlp + 4 * width) + 2 * width + 4 * width + 4
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_permuting_the_batch_permutes_the_output(make_vit: MakeVit, rng: torch.Generator) -> None:
    model = make_vit()
    set_head(model, torch.randn(5, 14, generator=rng), torch.randn(5, generator=rng))
    images = pixels(7, rng)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    with torch.no_grad():
        logits = model(images).logits
        assert not torch.allclose(logits[0], logits[1], atol=1e-3), "nothing to tell apart"
        torch.testing.assert_close(model(images[order]).logits, logits[order])


@pytest.mark.parametrize("num_classes", [2, 4, 5])
def test_an_untrained_head_guesses(
    make_vit: MakeVit, rng: torch.Generator, num_classes: int
) -> None:
    model = make_vit(label_names=[str(label) for label in range(num_classes)])
    labels = torch.arange(7) % num_classes
    loss = nn.functional.cross_entropy(model(pixels(7, rng)).logits, labels)
    assert loss.item() == pytest.approx(math.log(num_classes), abs=0.1)


def test_the_whole_backbone_learns_from_the_first_step(
    make_vit: MakeVit, rng: torch.Generator
) -> None:
    """Behind a zero head it would not, and training starts on a plateau."""
    model = make_vit()
    loss = nn.functional.cross_entropy(model(pixels(3, rng)).logits, torch.tensor([0, 1, 1]))
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        # A key's bias shifts all logits of a query alike, so its gradient is zero but for rounding.
        if "k_proj.bias" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_weights_depend_on_the_seed_alone(make_vit: MakeVit) -> None:
    torch.manual_seed(1)
    first = make_vit(seed=3).state_dict()
    torch.manual_seed(2)
    again = make_vit(seed=3).state_dict()
    other = make_vit(seed=4).state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        drawn = not name.endswith(("bias", "position_embeddings")) and "norm" not in name
        assert torch.equal(weight, other[name]) != drawn, name


def test_the_backbone_does_not_depend_on_the_classes_or_on_deeper_blocks(make_vit: MakeVit) -> None:
    one = make_vit().vit.state_dict()
    for changes in ({"label_names": ["up", "down"]}, {"depth": 4}):
        other = make_vit(**changes).vit.state_dict()
        for name, weight in one.items():
            assert torch.equal(weight, other[name]), name


def test_the_global_random_state_is_left_alone(make_vit: MakeVit, rng: torch.Generator) -> None:
    before = torch.random.get_rng_state()
    model = make_vit(dropout=0.5)
    replace_head(model, ["up", "down"])
    layer_features(model, pixels(2, rng))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_other_weights_are_distributed_as_transformers_draws_them(make_vit: MakeVit) -> None:
    sizes: dict[str, Any] = {"embed_dim": 70, "image_size": 35}
    ours = make_vit(**sizes)
    theirs = ViTForImageClassification(ours.config)
    for (name, weight), reference in zip(
        ours.vit.named_parameters(), theirs.vit.parameters(), strict=True
    ):
        if name.endswith("position_embeddings"):
            continue
        if weight.ndim > 1 and weight.numel() > 1000:
            # Five standard errors of a standard deviation.
            bound = 5 * 0.02 / math.sqrt(2 * weight.numel())
            assert weight.std().item() == pytest.approx(0.02, abs=bound), name
            assert reference.std().item() == pytest.approx(0.02, abs=bound), name
        elif weight.ndim == 1:
            assert torch.equal(weight, reference), name


def test_xavier_weights_are_those_of_torch(make_vit: MakeVit) -> None:
    ours = make_vit(embed_dim=70, image_size=35, weights="xavier")
    checked = 0
    for name, weight in ours.vit.named_parameters():
        if weight.ndim < 2 or name.endswith(("cls_token", "position_embeddings")):
            continue
        reference = nn.init.xavier_uniform_(torch.empty_like(weight.flatten(1)))
        # Five standard errors of the difference of two standard deviations.
        bound = 5 * reference.std().item() * math.sqrt(2 * 0.2 / weight.numel())
        assert weight.std().item() == pytest.approx(reference.std().item(), abs=bound), name
        assert weight.abs().max().item() == pytest.approx(reference.abs().max().item(), rel=0.01)
        checked += 1
    assert checked == 1 + 6 * len(ours.vit.layers)
    head = dict(ours.named_parameters())["classifier.weight"]
    assert head.std().item() == pytest.approx(0.02, rel=0.2)


def test_position_embeddings_begin_as_waves_along_columns_and_rows(make_vit: MakeVit) -> None:
    model = make_vit(image_size=15, patch_size=5, embed_dim=18, num_heads=2)
    places = model.vit.embeddings.position_embeddings
    assert places.shape == (1, 10, 18)
    assert places.requires_grad
    assert not places[0, 0].any(), "the class token has no place"
    assert not places[0, :, 16:].any(), "4 does not divide 18"
    for row in range(3):
        for column in range(3):
            expected = [
                wave(place / 10_000 ** (k / 4))
                for place in (column, row)
                for wave in (math.sin, math.cos)
                for k in range(4)
            ]
            found = places[0, 1 + 3 * row + column, :16].tolist()
            assert found == pytest.approx(expected, abs=1e-6), (row, column)


def test_no_state_besides_the_weights(make_vit: MakeVit) -> None:
    # `allocate` fills in parameters only; a buffer would be left with whatever was in memory.
    assert list(make_vit().buffers()) == []


def test_features_of_every_layer_equal_those_of_transformers(
    make_vit: MakeVit, rng: torch.Generator
) -> None:
    model = make_vit()
    images = pixels(2, rng)
    features = layer_features(model, images)
    with torch.no_grad():
        theirs = model.vit(images, output_hidden_states=True)

    assert features.cls.shape == features.mean.shape == (4, 2, 14)
    assert len(theirs.hidden_states) == 4
    for layer, hidden in enumerate(theirs.hidden_states):
        torch.testing.assert_close(features.cls[layer], hidden[:, 0])
        torch.testing.assert_close(features.mean[layer], hidden[:, 1:].mean(dim=1))
    torch.testing.assert_close(features.final_cls, theirs.last_hidden_state[:, 0])


def test_the_head_reads_final_cls(make_vit: MakeVit, rng: torch.Generator) -> None:
    model = make_vit()
    weight, bias = torch.randn(5, 14, generator=rng), torch.randn(5, generator=rng)
    set_head(model, weight, bias)
    images = pixels(3, rng)
    with torch.no_grad():
        logits = model(images).logits
    torch.testing.assert_close(layer_features(model, images).final_cls @ weight.T + bias, logits)


def test_the_class_token_knows_nothing_before_the_first_block(
    make_vit: MakeVit, rng: torch.Generator
) -> None:
    features = layer_features(make_vit(), pixels(3, rng))
    assert torch.equal(features.cls[0, 0], features.cls[0, 1])
    assert not torch.allclose(features.cls[1, 0], features.cls[1, 1], atol=1e-6)


def test_extraction_leaves_the_model_as_it_found_it(
    make_vit: MakeVit, rng: torch.Generator
) -> None:
    model = make_vit(dropout=0.5).train()
    model.vit.layers[0].eval()
    modes = [module.training for module in model.modules()]
    images = pixels(2, rng)

    features = layer_features(model, torch.cat([images, images]))

    torch.testing.assert_close(features.mean[:, :2], features.mean[:, 2:])  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


def test_a_head_can_be_trained_on_the_features(make_vit: MakeVit, rng: torch.Generator) -> None:
    features = layer_features(make_vit(), pixels(3, rng))
    head = nn.Linear(14, 5)
    head(features.final_cls).sum().backward()
    assert head.weight.grad is not None


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 3)).train()
    seen = []

    def forward_and_fail() -> None:
        with eval_mode(model):
            seen.append(model[0].training)
            model(torch.zeros(1, 5))

    with pytest.raises(RuntimeError):
        forward_and_fail()
    assert seen == [False]
    assert model.training
    assert model[0].training


def test_layers_have_names() -> None:
    assert layer_names(3) == ["embedding", "block 1", "block 2", "block 3"]


def test_a_replaced_head_guesses_and_leaves_the_backbone(
    make_vit: MakeVit, rng: torch.Generator
) -> None:
    model = make_vit()
    set_head(model, torch.randn(5, 14, generator=rng), torch.randn(5, generator=rng))
    before = {name: value.clone() for name, value in model.vit.state_dict().items()}
    replace_head(model, ["up", "left", "down"])

    logits = model(pixels(2, rng)).logits
    assert torch.equal(logits, torch.zeros(2, 3))
    assert model.num_labels == model.config.num_labels == 3
    assert model.config.id2label == {0: "up", 1: "left", 2: "down"}
    assert model.config.label2id == {"up": 0, "left": 1, "down": 2}
    for name, value in model.vit.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.classifier.weight.requires_grad


def test_two_classes_may_share_a_name(make_vit: MakeVit) -> None:
    model = make_vit(label_names=["crane", "heron", "crane"])
    assert model.config.id2label == {0: "crane", 1: "heron", 2: "crane"}
    assert model.config.label2id == {"crane": 0, "heron": 1}


@pytest.mark.parametrize(
    ("weight", "bias"), [((4, 14), (4,)), ((14, 5), (5,)), ((5, 14), (1,))], ids=str
)
def test_a_head_of_another_shape_is_refused(
    make_vit: MakeVit, weight: tuple[int, ...], bias: tuple[int, ...]
) -> None:
    with pytest.raises(ModelError, match=r"\(5, 14\) and \(5,\), got") as error:
        set_head(make_vit(), torch.zeros(weight), torch.zeros(bias))
    assert f"{weight} and {bias}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 17}, r"image_size must be a multiple .* got 17 and 5.*image_size=15\."),
        ({"image_size": 3}, r"got 3 and 5.*image_size=5\."),
        ({"embed_dim": 24}, r"embed_dim must be a multiple .* got 24 and 7.*embed_dim=21\."),
        ({"depth": 0}, r"model\.depth must be at least 1, got 0"),
        ({"dropout": 1.0}, r"model\.dropout must be .* below 1, got 1\.0"),
        ({"mlp_ratio": 0.01}, r"model\.mlp_ratio must give .* got 0\.01"),
        ({"label_names": ["alone"]}, r"at least two classes .* got \['alone'\]"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_explained(
    make_vit: MakeVit, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        make_vit(**changes)


def test_every_class_needs_a_name() -> None:
    with pytest.raises(ModelError, match="num_labels is 3, got 2 names"):
        build_vit(15, 5, 14, 1, 7, 1.0, 0.0, num_labels=3, label_names=["a", "b"], seed=0)
