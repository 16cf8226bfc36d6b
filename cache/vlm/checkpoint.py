"""Reading the files of a VLM checkpoint that an encoder needs, from a folder or a hub id.

A model family tells by `canonical(stored name) -> name | None` which stored tensors it needs and what it calls them:
transformers versions store the same model under different names. A file without a needed tensor may be missing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...common.documents import read_json
from ...errors import UserError

Canonical = Callable[[str], str | None]


def checkpoint_folder(path: str, revision: str | None, canonical: Canonical) -> Path:
    """The local folder of a checkpoint; of a hub id, only the needed files are downloaded, unless cached."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{path} is not a checkpoint folder: config.json is missing; give a transformers checkpoint"
            )
        return folder
    if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise UserError(
            f"checkpoint folder {path} does not exist, and it is not a hub id of the form owner/name; if the VLM "
            "moved, give --vlm-path"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        small = ["*.json", "*.txt", "*.jinja"]
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=small))
        files = sorted(set(_tensor_files(folder, canonical).values())) or ["model.safetensors"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=small + files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:100]
        raise UserError(
            f"cannot get {path} from the hub: give a local checkpoint folder, or go online, check the name and log in "
            f"if it is gated ({reason})"
        ) from None


def require_model_type(folder: Path, path: str, vlm: str, wanted: str, part: str | None = None) -> None:
    """`UserError` unless config.json, or its `part` (e.g. "text_config"), has model_type `wanted`."""
    config = read_json(folder / "config.json")
    found = (config.get(part) or {} if part else config).get("model_type")
    if found != wanted:
        where = f"{part}.model_type" if part else "model_type"
        raise UserError(f"{path} is a '{found}' checkpoint; --vlm {vlm} needs {where} '{wanted}'")


def read_tensors(folder: Path, canonical: Canonical, model: str, required: str) -> dict[str, torch.Tensor]:
    """The needed tensors by canonical name, sorted, in the stored dtype. `model` names the family in messages.

    `UserError` when a needed file is missing or damaged, or when the tensor `required`, or every other one, is absent.
    """
    from safetensors import SafetensorError, safe_open

    wanted = _tensor_files(folder, canonical)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(wanted.values())) or ["model.safetensors"]:
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} is incomplete: {file}, with vision or embedding weights, is missing; download it again"
            )
        try:
            with safe_open(folder / file, framework="pt") as f:
                tensors |= {new: f.get_tensor(name) for name in f.keys() if (new := canonical(name)) is not None}
        except SafetensorError as error:
            raise UserError(f"{folder / file} is damaged ({error}); download it again") from None
    absent = sorted({canonical(name) or name for name in wanted} - set(tensors)) or list({required} - set(tensors))
    if absent or len(tensors) < 2:
        raise UserError(
            f"{folder} lacks weights of a {model} model: {', '.join(absent[:3]) or 'all of its vision tower'}"
        )
    return dict(sorted(tensors.items()))


def assign_tensors(
    module: torch.nn.Module, tensors: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype, path: str
) -> None:
    """Replace a module's meta tensors by `tensors`, one for each; `UserError` when they do not fit its config."""
    try:
        state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: its vision weights do not fit its config: {reason}") from None


def require_filled(module: torch.nn.Module) -> None:
    """`ValueError` when a tensor is still on the meta device: this transformers version has one that we do not fill."""
    left = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    if left:
        raise ValueError(f"this transformers version has tensors neither stored nor rebuilt: {', '.join(left)}")


def load_config(folder: Path) -> Any:
    """The checkpoint's config. `UserError` when transformers cannot read it, or it needs code of its own."""
    from transformers import AutoConfig

    with _without_code(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


@contextlib.contextmanager
def _without_code(folder: Path) -> Iterator[None]:
    """`UserError` for whatever transformers raises: a file may hold anything, and code in the folder is never run."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{folder} cannot be read as a checkpoint, or needs code of its own, which is never run ({reason})"
        ) from None


def load_tokenizer(folder: Path, path: str) -> Any:
    """The checkpoint's tokenizer; `UserError` when none of its files exists, or it needs code of its own."""
    import transformers
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "vocab.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{path} has no tokenizer: none of {', '.join(names)} exists; copy the tokenizer's files there")
    file = folder / "tokenizer_config.json"
    with _without_code(folder):
        stored = read_json(file) if file.is_file() else {}
        name = (stored.get("tokenizer_class") or "").removesuffix("Fast")
        # transformers 5 takes a generic tokenizer where it has no class of that name
        if "auto_map" in stored and name and not any(hasattr(transformers, name + end) for end in ("", "Fast")):
            raise ValueError(f"{file.name} names the class {name}")
        # transformers 5 stores their names, which 4 cannot read; tokenizer.json has the tokens themselves
        named = transformers.__version__.startswith("4.") and isinstance(stored.get("extra_special_tokens"), list)
        options: dict[str, Any] = {"extra_special_tokens": {}} if named else {}
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)


def image_statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel from the processor's file (transformers 5: inside processor_config.json)."""
    file = folder / "preprocessor_config.json"
    newer = folder / "processor_config.json"
    values = read_json(file) if file.is_file() else read_json(newer).get("image_processor", {})
    if "image_mean" not in values or "image_std" not in values:
        raise UserError(f"{folder}: the processor config gives no image_mean and image_std")
    return tuple(values["image_mean"]), tuple(values["image_std"])


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of the tensors, in order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensor_files(folder: Path, canonical: Canonical) -> dict[str, str]:
    """{stored name of a needed tensor: file name} from the index; empty for a checkpoint in one file."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    return {name: file for name, file in read_json(index)["weight_map"].items() if canonical(name) is not None}
