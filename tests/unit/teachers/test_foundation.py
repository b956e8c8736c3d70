"""A vision model as the teacher of features: what it sees, what it says, and where its weights come from."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from nnunet_kd.errors import SettingsError, TeacherError
from nnunet_kd.settings import Foundation, Teacher, Term
from nnunet_kd.teachers.base import HiddenCases
from nnunet_kd.teachers.foundation import SEEN, FoundationTeacher
from nnunet_kd.teachers.foundation_model import build_foundation
from nnunet_kd.teachers.token_maps import TokenMaps

TINY = "test_vit"  # of timm, 64 wide with patches of 16 pixels


class MeanColour(nn.Module):
    """Patches of 8 pixels; their tokens are the mean of each colour."""

    multiple, mean, std = 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 8)


def not_a_map() -> nn.Module:
    return nn.Flatten()


def student(scheme: str, spacing: tuple[float, ...]) -> Any:
    properties = {"0": {"mean": 50.0, "std": 25.0, "percentile_00_5": 0.0, "percentile_99_5": 100.0}}
    return SimpleNamespace(
        configuration_manager=SimpleNamespace(
            normalization_schemes=[scheme],
            spacing=list(spacing),
            patch_size=[6, 24, 32][-len(spacing) :],
            data_identifier="nnUNetPlans_3d_fullres",
        ),
        plans_manager=SimpleNamespace(foreground_intensity_properties_per_channel=properties),
    )


def teacher(scheme: str = "CTNormalization", spacing: tuple[float, ...] = (3.0, 1.0, 1.0), **options: Any) -> Any:
    model = options.pop("model", f"{__name__}:MeanColour")
    settings = Teacher(kind="foundation", model=model, precision="float32", foundation=Foundation(**options))
    own = FoundationTeacher("foundation", settings, student(scheme, spacing))
    own.load(torch.device("cpu"), ["encoder@1/16"], set(), False, HiddenCases())
    return own


def test_tokens_of_slices_across_the_coarsest_axis() -> None:
    own = teacher(spacing=(1.0, 1.0, 3.0), slices=3, size=32)
    image = torch.rand(2, 2, 32, 16, 9) * 4 - 2  # of CT: -2 is the 0.5th, 2 the 99.5th percentile
    output = own({"data": image}, set())
    tokens, slices = output.features["encoder@1/16"], output.slices
    assert tokens.shape == (2, 3, 3, 4, 2)
    for sample in range(2):
        for place in range(3):
            seen = (image[sample, 0, :, :, slices.indices[sample, place]] + 2) / 4
            expected = nn.functional.avg_pool2d(seen[None], 8)[0]
            for colour in range(3):
                torch.testing.assert_close(tokens[sample, colour, place], expected)


def test_a_2d_patch_is_seen_as_it_is_and_resized_to_a_multiple() -> None:
    own = teacher("RescaleTo01Normalization", (1.0, 1.0), size=40)
    output = own({"data": torch.full((2, 1, 100, 60), 0.25)}, set())
    assert output.slices is None
    assert output.features["encoder@1/16"].shape == (2, 3, 5, 3)  # 40 x 24 pixels
    torch.testing.assert_close(output.features["encoder@1/16"], torch.full((2, 3, 5, 3), 0.25))


def test_ranges_of_intensities() -> None:
    image = torch.tensor([-3.0, -2.0, 0.0, 2.0, 3.0]).view(1, 1, 1, 5)
    assert teacher().range(image).flatten().tolist() == [0, 0, 0.5, 1, 1]  # CT
    assert teacher("RescaleTo01Normalization").range(image).flatten().tolist() == [0, 0, 0, 1, 1]
    random = torch.randn(2, 1, 30, 40) * torch.tensor([1.0, 50.0]).view(2, 1, 1, 1)
    found = teacher("ZScoreNormalization").range(random)
    for slice_, own in zip(random, found, strict=True):
        low, high = np.quantile(slice_.numpy(), [0.01, 0.99], method="nearest").tolist()
        np.testing.assert_allclose(own, np.clip((slice_ - low) / (high - low), 0, 1), atol=0.01)
    assert teacher("ZScoreNormalization").range(torch.ones(1, 1, 4, 4)).isfinite().all()


def test_mixed_samples_are_not_seen() -> None:
    own = teacher(size=32)
    output = own({"data": torch.randn(5, 1, 6, 32, 32), SEEN: 3}, set())
    assert len(output.features["encoder@1/16"]) == len(output.slices.indices) == 3
    with pytest.raises(SettingsError, match="natural images only"):
        own.check_term(Term("foundation", "features", "cosine", levels=["bottleneck"], samples=["mixed"]), "terms[0]")
    for changed in ({"loss": "class_masked"}, {"loss": "mse", "foreground_only": True}):
        with pytest.raises(SettingsError, match="knows no classes"):
            own.check_term(Term("foundation", "features", levels=["bottleneck"], **changed), "terms[0]")
    with pytest.raises(SettingsError, match="teaches features only"):
        own.check_term(Term("foundation", "logits", "kl"), "terms[0]")


# --- token maps -------------------------------------------------------------------------------------------------------
class Cases:
    """A case of CT smaller than a patch along the first axis and larger along the last one."""

    def load_case(self, case: str) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(len(case))
        return torch.rand(2, 3, 24, 48, generator=generator).numpy() * 4 - 2, None, None, {}


def maps_of(own: Any, folder: Path) -> TokenMaps:
    file = folder / "a.b2nd"
    file.touch()
    maps: TokenMaps = own.token_maps({"a": (Cases(), [file])}, folder)
    return maps


def test_a_patch_that_nothing_was_done_to_gets_the_tokens_that_the_teacher_gives_it(tmp_path: Path) -> None:
    own = teacher(slices=6, size=32, cache=True)
    maps, patch = maps_of(own, tmp_path), (6, 24, 32)
    place = torch.tensor([[1.0, 0, 0, -2], [0, 1, 0, 0], [0, 0, 1, 8]])
    found = maps(["a"], place[None], patch)
    padded = nn.functional.pad(torch.from_numpy(Cases().load_case("a")[0]), (0, 0, 0, 0, 2, 1))
    data = padded[None, :, :, :, 8:40]  # as nnU-Net pads what is shorter than a patch
    cached = own({"data": data, **found}, set())
    assert torch.equal(cached.slices.indices, found["token_slices"])
    own._draw = lambda _: cached.slices
    fresh = own({"data": data}, set()).features["encoder@1/16"]
    torch.testing.assert_close(cached.features["encoder@1/16"], fresh, atol=1e-3, rtol=0)


def test_tokens_on_disk_are_for_the_teacher_that_asked_for_them(tmp_path: Path) -> None:
    found = maps_of(teacher(size=32, cache=True), tmp_path)(["a"], torch.eye(3, 4)[None], (6, 24, 32))
    data = torch.rand(1, 1, 6, 24, 32)
    torch.manual_seed(0)
    expected = teacher(size=16)({"data": data}, set()).features["encoder@1/16"]
    torch.manual_seed(0)
    torch.testing.assert_close(teacher(size=16)({"data": data, **found}, set()).features["encoder@1/16"], expected)


def test_what_tokens_depend_on_has_maps_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {maps_of(teacher(size=32, cache=True), tmp_path).folder}
    assert maps_of(teacher(size=32, slices=2, cache=True), tmp_path).folder in folders
    changes: list[tuple[str, Any]] = [("mean", (0.5, 0.0, 0.0)), ("std", (1.0, 2.0, 1.0)), ("multiple", 16)]
    for name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(MeanColour, name, value)
            folders.add(maps_of(teacher(size=32, cache=True), tmp_path).folder)
    folders |= {maps_of(teacher(size=16, cache=True), tmp_path).folder}
    folders |= {maps_of(teacher("RescaleTo01Normalization", size=32, cache=True), tmp_path).folder}
    monkeypatch.syspath_prepend(tmp_path)
    for code in ("", "# changed\n"):
        (tmp_path / "own_model.py").write_text(f"{code}import torch\nmake = lambda: torch.nn.AvgPool2d(1)\n")
        monkeypatch.delitem(sys.modules, "own_model", raising=False)
        folders.add(maps_of(teacher(model="own_model:make", size=32, cache=True), tmp_path).folder)
    assert len(folders) == 8


def test_a_network_that_sees_cases_of_all_sizes_is_not_compiled() -> None:
    for cache in (False, True):
        own = teacher(size=32, cache=cache)
        own.load(torch.device("cpu"), ["encoder@1/16"], set(), True, HiddenCases())
        assert isinstance(own.network, MeanColour) == cache


def test_maps_of_a_convolutional_network(tmp_path: Path) -> None:
    own = teacher(model="resnet18", pretrained=False, size=64, cache=True)
    assert np.load(maps_of(own, tmp_path).folder / "a.npy").shape == (6, 2, 3, 512)


# --- models and weights -----------------------------------------------------------------------------------------------
def test_patch_tokens_of_timm_are_the_last_blocks_without_class_tokens() -> None:
    built = build_foundation(TINY, Foundation(pretrained=False))
    assert "NOT PRETRAINED" in built.note
    assert not any(weight.requires_grad for weight in built.network.parameters())
    model = built.network.model
    images = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        everything = model.forward_features(images)  # class tokens first, normalised
    patches = everything[:, model.num_prefix_tokens :]
    expected = patches.transpose(1, 2).reshape(2, built.channels, 3, 2)
    torch.testing.assert_close(built.network(images), expected)
    assert model.num_prefix_tokens > 0
    assert built.multiple == 16


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "resnet18", "efficientnet_b0", "pvt_v2_b0"])
def test_models_of_timm_give_maps(name: str) -> None:
    built = build_foundation(name, Foundation(pretrained=False))
    size = 2 * built.multiple
    with torch.no_grad():
        assert built.network(torch.randn(1, 3, size, 2 * size)).shape == (1, built.channels, 2, 4)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vgg11", "hiera_tiny_224"])
def test_models_that_give_no_maps_are_refused(name: str) -> None:
    with pytest.raises(TeacherError, match=f"timm's '{name}' gives no map of features of an image of 96 x 160"):
        build_foundation(name, Foundation(pretrained=False))


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_weights_of_a_local_file(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(1)
    weights = timm.create_model(TINY).state_dict()
    file = tmp_path / f"model.{kind}"
    save_file(weights, file) if kind == "safetensors" else torch.save(weights, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    built = build_foundation(TINY, Foundation(weights=str(file), sha256=digest))
    found = built.network.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    with pytest.raises(TeacherError, match=f"SHA256.*{digest}"):
        build_foundation(TINY, Foundation(weights=str(file), sha256="00"))
    with pytest.raises(TeacherError, match="holds no weights of timm's 'resnet18'"):
        build_foundation("resnet18", Foundation(weights=str(file)))
    with pytest.raises(TeacherError, match="do not exist"):
        build_foundation(TINY, Foundation(weights=str(tmp_path / "none")))


class Malicious:
    """What a file could do when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("it_ran"),)


@pytest.mark.parametrize("name", [TINY, f"{__name__}:MeanColour"])
def test_nothing_in_a_file_of_weights_is_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model.pth"
    torch.save({"state_dict": Malicious()}, file)
    with pytest.raises(TeacherError, match=r"cannot be read as weights.*weights_only"):
        build_foundation(name, Foundation(weights=str(file)))
    assert not (tmp_path / "it_ran").exists()


def test_weights_of_the_users_own_module(tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    torch.save({}, file)
    built = build_foundation(f"{__name__}:MeanColour", Foundation(weights=str(file)))
    assert f"weights of {file}" in built.note
    torch.save({"other": torch.zeros(1)}, file)
    with pytest.raises(TeacherError, match="does not fit"):
        build_foundation(f"{__name__}:MeanColour", Foundation(weights=str(file)))


def test_without_a_connection_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TeacherError) as error:
        build_foundation("vit_small_patch16_dinov3", Foundation())
    for part in (
        "huggingface.co/timm/vit_small_patch16_dinov3",
        "model.safetensors",
        '"weights"',
        "SHA256",
        "pretrained",
    ):
        assert part in str(error.value)


def test_building_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build_foundation(TINY, Foundation(pretrained=False))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_small_patch17", "timm has no model.*vit_"),
        ("vit_small_patch16_dinov3.nope", "timm cannot make"),
        ("hf_hub:timm/vit_small_patch16_dinov3", "a name on a hub"),
        ("no_such_module:model", "cannot be made.*MODULE:FUNCTION"),
        (f"{__name__}:nothing", "cannot be made"),
        ("builtins:dict", "returned a dict"),
        (f"{__name__}:not_a_map", r"returned \(1, .*map \[N, C, h, w\]"),
    ],
)
def test_bad_models(name: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        build_foundation(name, Foundation(pretrained=False))


def test_random_weights_are_the_same_in_every_process() -> None:
    weights = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = build_foundation("test_vit", Foundation(pretrained=False)).network
        weights.append(torch.cat([value.flatten() for value in network.state_dict().values()]))
        assert torch.initial_seed() == seed  # nothing else is seeded anew
    assert torch.equal(*weights)
