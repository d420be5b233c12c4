"""Model folders: a checkpoint, or a LoRA adapter on one, to a model and its tokenizer; checks before the weights load.

Everything is read from disk. A hub model is downloaded first: `hf download ORG/NAME` prints its folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from entropy_fast.errors import InputError
from entropy_fast.files import atomic_directory

DType = Literal["auto", "float32", "bfloat16", "float16"]

_CONFIG = "config.json"
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready to score.

    Attributes:
        path: the folder that it came from.
        model: in evaluation mode, on its device.
        tokenizer: None when the folder holds none; scoring needs only ids.
    """

    path: Path
    model: Any
    tokenizer: Any | None

    @property
    def vocab_size(self) -> int:
        """The number of ids that the model can read."""
        return self.model.get_input_embeddings().weight.shape[0]


def find_device(name: torch.device | str | None = None) -> torch.device:
    """The named device, or by default the GPU where there is one, else the CPU.

    Raises:
        InputError: no device has that name, or this machine lacks it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device must be cpu, cuda, cuda:1 or the like, got {str(name)!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name} is not here: torch sees {torch.cuda.device_count()} CUDA GPUs")
    return device


def is_adapter(path: str | Path) -> bool:
    """Whether the folder holds a peft adapter rather than whole weights."""
    return (Path(path) / _ADAPTER).is_file()


def is_checkpoint(path: str | Path) -> bool:
    """Whether the folder holds a transformers model."""
    return (Path(path) / _CONFIG).is_file()


def check_model_folder(path: str | Path) -> Path:
    """Return `path` when it looks like a model folder.

    Raises:
        InputError: it does not exist, or holds neither config.json nor adapter_config.json.
    """
    folder = Path(path)
    if not folder.exists():
        looks_remote = len(folder.parts) == 2 and not folder.is_absolute() and folder.parts[0] not in (".", "..")
        hint = (
            f"; for the hub's model, run `hf download {folder}` and give the folder it prints" if looks_remote else ""
        )
        raise InputError(f"the model folder {folder} does not exist{hint}")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; a model is a folder that save_pretrained wrote, give that")
    if not is_checkpoint(folder) and not is_adapter(folder):
        raise InputError(
            f"{folder} is not a model folder: it has neither {_CONFIG} nor {_ADAPTER}; give a folder that "
            "save_pretrained wrote"
        )
    return folder


def load_model(path: str | Path, *, device: torch.device | str | None = None, dtype: DType = "auto") -> LoadedModel:
    """Load a checkpoint, or an adapter together with the base folder that it names.

    Args:
        path: a folder that transformers can load.
        device: by default the GPU where there is one.
        dtype: `auto` keeps the checkpoint's own.

    Raises:
        InputError: not a model folder, not a causal language model, damaged, or with weights missing.
    """
    folder = check_model_folder(path)
    if is_adapter(folder) and not is_checkpoint(folder):
        base = _read_json(folder / _ADAPTER).get("base_model_name_or_path")
        if not base or not is_checkpoint(base):
            raise InputError(f"{folder} is an adapter on {base!r}, which is no folder here; load the base, then it")
        return with_adapter(load_model(base, device=device, dtype=dtype), folder)
    where = find_device(device)
    transformers = _transformers()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder} cannot be loaded as a causal language model: {_first_line(error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{folder} lacks {len(missing)} of the model's weights ({missing[0]}, say), which would be random; "
            "is the checkpoint whole, and of a causal language model?"
        )
    return LoadedModel(folder, model.eval().to(where), load_tokenizer(folder))


def with_adapter(base: LoadedModel, path: str | Path) -> LoadedModel:
    """The base model with a peft adapter switched on; the base's weights are shared, not copied.

    Raises:
        InputError: peft is not installed, or the adapter does not fit the base.
    """
    folder = check_model_folder(path)
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError(f"{folder} is a peft adapter; install what reads it: pip install entropy_fast[lora]") from None
    try:
        model = PeftModel.from_pretrained(base.model, folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"the adapter {folder} does not fit {base.path}: {_first_line(error)}") from None
    return LoadedModel(folder, model.eval(), load_tokenizer(folder) or base.tokenizer)


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer, or None when it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        return _transformers().AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer of {folder} cannot be loaded: {_first_line(error)}") from None


def check_same_vocabulary(original: str | Path, updated: str | Path) -> None:
    """Check, without loading weights, that one list of token ids means the same to both models.

    An adapter has its base's vocabulary, unless it brings a tokenizer of its own.

    Raises:
        InputError: the vocabularies differ in size, or an id stands for different tokens.
    """
    folders = [check_model_folder(path) for path in (original, updated)]
    if all(is_checkpoint(folder) for folder in folders):
        sizes = [_vocab_size(folder) for folder in folders]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{original} and {updated} have different vocabularies ({sizes[0]} and {sizes[1]} tokens), so one "
                "rollout cannot be scored by both; compare two checkpoints of the same model"
            )
    tokenizers = [load_tokenizer(folder) for folder in folders]
    if all(tokenizer is not None for tokenizer in tokenizers):
        first, second = ({index: token for token, index in t.get_vocab().items()} for t in tokenizers)  # type: ignore[union-attr]
        clash = next((i for i in sorted(first.keys() & second.keys()) if first[i] != second[i]), None)
        if clash is not None:
            raise InputError(
                f"{original} and {updated} have different vocabularies: id {clash} is {first[clash]!r} in one and "
                f"{second[clash]!r} in the other; compare two checkpoints of the same model"
            )


def save_checkpoint(path: str | Path, model: Any, tokenizer: Any | None = None) -> None:
    """Write a model folder, whole or not at all. An older model folder at `path` is replaced, anything else is not."""

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    atomic_directory(path, fill, ours=lambda folder: is_checkpoint(folder) or is_adapter(folder))


def _vocab_size(folder: Path) -> int:
    try:
        return _transformers().AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / _CONFIG} is not a language model's: {_first_line(error)}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _transformers() -> Any:
    import transformers  # seconds of import, so only when a model is wanted

    return transformers
