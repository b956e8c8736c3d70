"""Build a vision foundation model: from timm by its name, or the user's own; with weights from the hub or a file."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from nnunet_kd.errors import TeacherError
from nnunet_kd.settings import Foundation

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFAULT_MODEL = "vit_small_patch16_dinov3"
READ_BYTES = 1 << 20
SEED = 0  # of random weights: the same network in every process, and when a training goes on
PROBE = (3, 5)  # tokens of an image that a model is tried on
USUAL_STRIDE = 32  # of the last features, where a model does not tell


class FoundationModel(NamedTuple):
    """``network``: [N, 3, H, W] -> patch tokens [N, channels, h, w]; H and W are multiples of ``multiple``.

    ``mean``, ``std``: of the three colours, for images in [0, 1]. ``note``: what was built, for the log. ``code``:
    SHA256 of the user's own module.
    """

    network: nn.Module
    channels: int
    multiple: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str
    code: str = ""


class PatchTokens(nn.Module):
    """The last features of a timm model as a map; of a transformer the normalised patch tokens of its last block.

    Class and register tokens are left out.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, C, h, w]."""
        tokens: Tensor = self.model.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )[-1]
        return tokens


def build_foundation(name: str, settings: Foundation) -> FoundationModel:
    """Build a foundation model in eval mode, without gradient.

    Args:
        name: Of a timm model, or MODULE:FUNCTION, a function without arguments that returns a module
            [N, 3, H, W] -> [N, C, h, w]. The module may name ``multiple``, ``mean`` and ``std``, see
            :class:`FoundationModel`; else 1 and ImageNet's.
        settings: Weights.

    Raises:
        TeacherError: An unknown name, no weights to be had, or a file that is not what it should be.
    """
    with torch.random.fork_rng(devices=[]):  # a student starts from the weights of its control
        torch.default_generator.manual_seed(SEED)  # that of the CPU alone, which is put back
        is_own = ":" in name and "/" not in name  # not a name on a hub, hf_hub:timm/...
        model = _own_module(name, settings) if is_own else _timm_model(name, settings)
    model.network.eval().requires_grad_(False)
    return model


def _own_module(name: str, settings: Foundation) -> FoundationModel:
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
        network = getattr(module, function)()
    except (ImportError, AttributeError) as error:
        raise TeacherError(
            f"The foundation model '{name}' cannot be made: {error}. Give MODULE:FUNCTION of an importable module, "
            f"whose function returns a torch module, or the name of a timm model."
        ) from error
    if not isinstance(network, nn.Module):
        raise TeacherError(f"'{name}' returned a {type(network).__name__}, but a foundation model is a torch module.")
    if settings.weights is not None:
        try:
            network.load_state_dict(_read_weights(_checked_file(settings)))
        except RuntimeError as error:
            raise TeacherError(f"{settings.weights} does not fit '{name}': {_first_line(error)}") from error
    multiple = int(getattr(network, "multiple", 1))
    with torch.no_grad():
        tokens = network.eval()(torch.zeros(1, 3, max(multiple, 32), max(multiple, 32)))
    if not isinstance(tokens, Tensor) or tokens.ndim != 4:
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TeacherError(f"'{name}' returned {shape}, but a foundation model returns a map [N, C, h, w].")
    mean, std = (tuple(getattr(network, key, default)) for key, default in _COLOURS.items())
    origin = "weights as it made them" if settings.weights is None else f"weights of {settings.weights}"
    code = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest() if module.__file__ else ""
    return FoundationModel(network, tokens.shape[1], multiple, mean, std, f"{name}, {origin}", code)


_COLOURS = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def _timm_model(name: str, settings: Foundation) -> FoundationModel:
    if "/" in name:
        raise TeacherError(
            f"'{name}' is a name on a hub. Give timm's name of the model, for example '{DEFAULT_MODEL}'."
        )
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        alike = timm.list_models(f"*{architecture.partition('_')[0]}*dino*") or timm.list_models("*dino*")
        raise TeacherError(f"timm has no model '{name}'. For example: {', '.join(alike[:6])}; all: timm.list_models().")
    options: dict[str, Any] = {}  # with its own number of classes: else timm accepts weights that are not the model's
    if settings.weights is not None:
        weights = _read_weights(_checked_file(settings))
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}
        note = f"weights of {settings.weights}"
    else:
        options["pretrained"] = settings.pretrained
        note = "pretrained weights of the hub" if settings.pretrained else "NOT PRETRAINED: random weights"
    try:
        model = _create(name, options)
    except Exception as error:
        if not options["pretrained"]:
            raise TeacherError(f"timm cannot make '{name}': {_first_line(error)}") from error
        raise TeacherError(_no_weights(name, settings, error)) from error
    config, network, multiple = model.pretrained_cfg, PatchTokens(model), _multiple(model)
    channels = _probed_channels(name, network, multiple)
    return FoundationModel(network, channels, multiple, config["mean"], config["std"], f"{name}, {note}")


def _multiple(model: Any) -> int:
    """What the sides of its images have to be multiples of: the stride of its last features."""
    strides = [int(own["reduction"]) for own in getattr(model, "feature_info", None) or () if "reduction" in own]
    return max(strides, default=USUAL_STRIDE)


def _probed_channels(name: str, network: nn.Module, multiple: int) -> int:
    """Width of its features, seen on an image that is not square."""
    shape = PROBE[0] * multiple, PROBE[1] * multiple
    try:
        with torch.no_grad():
            tokens = network.eval()(torch.zeros(1, 3, *shape))
        fits = tuple(tokens.shape[2:]) == PROBE
        reason = f"it returned {tuple(tokens.shape)}"
    except Exception as error:
        fits, reason = False, _first_line(error)
    if not fits:
        raise TeacherError(
            f"timm's '{name}' gives no map of features of an image of {shape[0]} x {shape[1]} ({reason}). Take a "
            f"vision transformer (vit_*, deit3_*, eva02_*, samvit_*) or a convolutional network (resnet*, convnext_*); "
            f"models of windows or of one fixed size (swin_*, beit_*, maxvit_*) cannot be used."
        )
    return int(tokens.shape[1])


def _create(name: str, options: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, dynamic_img_size=True, **options)
    except TypeError:  # convolutional networks take any size and no such argument
        return timm.create_model(name, **options)


def _no_weights(name: str, settings: Foundation, error: Exception) -> str:
    """What to do where weights cannot be fetched or read."""
    reason = _first_line(error)
    if settings.weights is not None:
        return (
            f"{settings.weights} holds no weights of timm's '{name}' ({reason}). Give a safetensors file or a state "
            f"dict of this very model, or name the model that the file belongs to."
        )
    config = timm.get_pretrained_cfg(name)
    hub = f"https://huggingface.co/{config.hf_hub_id}" if config is not None and config.hf_hub_id else "its authors"
    return (
        f"The pretrained weights of '{name}' cannot be fetched ({reason}). On a machine with a connection, download "
        f"model.safetensors from {hub} (accept its licence there, where it has one), copy it here and name it: "
        f'"teachers": {{"foundation": {{"foundation": {{"weights": "/path/to/model.safetensors", "sha256": '
        f'"..."}}}}}}. '
        f"The page of the file shows its SHA256; sha256sum prints that of your copy. Without weights, "
        f'"pretrained": false trains against a random network, for tests and ablations.'
    )


def _checked_file(settings: Foundation) -> Path:
    """The file of the weights, after its hash was compared."""
    file = Path(str(settings.weights)).expanduser()
    if not file.is_file():
        raise TeacherError(f"The weights of the foundation model, {file}, do not exist. Correct 'weights'.")
    if settings.sha256 is not None:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(READ_BYTES):
                digest.update(block)
        found = digest.hexdigest()
        if found != settings.sha256.lower():
            raise TeacherError(
                f"The SHA256 of {file} is {found}, but 'sha256' says {settings.sha256}. The file is damaged or another "
                f"one: fetch it again, or correct 'sha256'."
            )
    return file


def _read_weights(file: Path) -> dict[str, Any]:
    """A state dict from safetensors or torch's format; nothing in the file is run."""
    try:
        weights: dict[str, Any] = timm.models.load_state_dict(str(file), weights_only=True)
    except Exception as error:
        raise TeacherError(
            f"{file} cannot be read as weights ({_first_line(error)}). Give a safetensors file or a state dict that "
            f"torch.load reads with weights_only=True."
        ) from error
    return weights


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
