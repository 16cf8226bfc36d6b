"""Reading the files of a VLM checkpoint that an encoder needs, from a folder or a hub id.

A model family tells by `canonical(stored name) -> name | None` which stored tensors it needs and what it calls them:
transformers versions store the same model under different names. A file without a needed tensor may be missing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from ...common.documents import Field, Form, read_json, require_file, require_form
from ...common.tensors import form_of, open_tensors, require_tensors
from ...common.text import printable
from ...errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of stored weights
MOST_TEXT = 256 << 20  # bytes of a tokenizer's or processor's file; the largest have 35 MB
Canonical = Callable[[str], str | None]


def checkpoint_folder(path: str, revision: str | None, needed: Callable[[Path], Canonical]) -> Path:
    """The local folder of a checkpoint; of a hub id, only the needed files are downloaded, unless cached.

    `needed`: from a folder with its config, which tensors."""
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
        files = sorted(set(_tensor_files(folder, needed(folder)).values())) or ["model.safetensors"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=small + files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:100]
        raise UserError(
            f"cannot get {path} from the hub: give a local checkpoint folder, or go online, check the name and log in "
            f"if it is gated ({reason})"
        ) from None


Size = Annotated[int, Field(ge=1, le=65536)]
Layers = Annotated[int, Field(ge=1, le=1024)]
Channel = Annotated[list[Annotated[float, Field(ge=-1, le=1)]], Field(min_length=3, max_length=3)]
Spread = Annotated[list[Annotated[float, Field(ge=1e-3, le=2)]], Field(min_length=3, max_length=3)]


class Foreign(Form, extra="ignore"):
    """A document that others write: unknown keys are theirs. A field that lacks has transformers' default."""


class RotaryForm(Foreign):
    """How positions turn, as transformers 5 writes it."""

    rope_theta: Annotated[float, Field(gt=1, le=1e12)] = 1e4


class TowerForm(Foreign):
    """What is read of a vision or language model's config, in any family."""

    depth: Layers = 1
    num_hidden_layers: Layers = 1
    hidden_size: Size = 1
    intermediate_size: Annotated[int, Field(ge=1, le=1 << 20)] = 1
    out_hidden_size: Size = 1
    projection_dim: Size = 1
    num_heads: Layers = 1
    num_attention_heads: Layers = 1
    num_key_value_heads: Layers = 1
    head_dim: Size = 1
    in_channels: Literal[3] = 3
    num_channels: Literal[3] = 3
    image_size: Annotated[int, Field(ge=1, le=16384)] = 1
    patch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    spatial_merge_size: Annotated[int, Field(ge=1, le=64)] = 1
    temporal_patch_size: Annotated[int, Field(ge=1, le=64)] = 1
    num_position_embeddings: Annotated[int, Field(ge=1, le=1 << 20)] = 1
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)] = 1
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 30)] = 1
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    rope_theta: Annotated[float, Field(gt=0, le=1e12)] = 1e4
    rope_parameters: RotaryForm | None = None
    hidden_act: str = ""
    hidden_activation: str = ""
    deepstack_visual_indexes: Annotated[list[Annotated[int, Field(ge=0, le=1024)]], Field(max_length=64)] = []


class ConfigForm(Foreign):
    """config.json."""

    model_type: str
    vision_config: TowerForm = TowerForm()
    text_config: TowerForm = TowerForm()


class StatisticsForm(Foreign):
    """What is read of preprocessor_config.json."""

    image_mean: Channel
    image_std: Spread


class TokenizerForm(Foreign):
    """What is read of tokenizer_config.json."""

    tokenizer_class: str | None = None
    auto_map: Any = None


class IndexForm(Foreign):
    """The index of a checkpoint in several files: no name leaves the folder."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^\w[\w.-]*\.safetensors$")]]


def require_model_type(folder: Path, path: str, vlm: str, wanted: str, part: str | None = None) -> None:
    """`UserError` unless config.json, or its `part` (e.g. "text_config"), has model_type `wanted`."""
    config = read_json(folder / "config.json", ConfigForm)
    found = (config.get(part) or {} if part else config).get("model_type")
    if found != wanted:
        where = f"{part}.model_type" if part else "model_type"
        raise UserError(f"{path} is a '{found}' checkpoint; --vlm {vlm} needs {where} '{wanted}'")


def require_layer(layer: int, total: int, where: str) -> None:
    """`UserError` for a layer that the language model `where` does not have."""
    if layer > total:
        raise UserError(f"--layers {layer}: give layers 1 to {total} of the language model of {where}")


def read_tensors(
    folder: Path,
    canonical: Canonical,
    model: str,
    required: str,
    expected: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """The needed tensors by canonical name, sorted, in the stored dtype. `model` names the family in messages.

    Args:
        required: the tensor that every such model has, a matrix.
        expected: names and shapes, of those that the files' headers name; nothing is loaded before they agree.

    `UserError` when a needed file is missing or damaged, or a tensor is absent or of another form, or not finite.
    """
    wanted = _tensor_files(folder, canonical)
    header: dict[str, torch.Tensor] = {}
    names: dict[str, dict[str, str]] = {}  # file → canonical name → stored name
    for file in sorted(set(wanted.values())) or ["model.safetensors"]:
        if not (folder / file).exists():
            raise UserError(
                f"{folder} is incomplete: {file}, with vision or embedding weights, is missing; download it again"
            )
        with open_tensors(folder / file, "download it again") as f:
            names[file] = {new: name for name in f.header if (new := canonical(name)) is not None}
            header |= {new: f.header[name] for new, name in names[file].items()}
    absent = sorted({canonical(name) or name for name in wanted} - set(header)) or list({required} - set(header))
    if absent or len(header) < 2:
        raise UserError(
            f"{folder} lacks weights of a {model} model: {', '.join(absent[:3]) or 'all of its vision tower'}"
        )
    if header[required].ndim != 2 or any(tensor.dtype not in DTYPES for tensor in header.values()):
        odd = next((n for n, tensor in header.items() if tensor.dtype not in DTYPES), required)
        raise UserError(f"{folder} is damaged: {odd} is {form_of(header[odd])}, expected a matrix of floats")
    forms = {
        name: tensor.to(header[name].dtype) if name in header else tensor for name, tensor in expected(header).items()
    }
    require_tensors(header, forms, f"{folder}: its vision weights do not fit its config: it", f"a {model} model of it")
    tensors: dict[str, torch.Tensor] = {}
    for file, stored in names.items():
        with open_tensors(folder / file, "download it again") as f:
            loaded = f.load(stored.values())
            tensors |= {new: loaded[name] for new, name in stored.items()}
    return dict(sorted(tensors.items()))


def assign_tensors(
    module: torch.nn.Module, tensors: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype, path: str
) -> None:
    """Replace a module's meta tensors by `tensors`, one for each; `UserError` when they do not fit its config.

    Takes them out of `tensors`, so that none is in memory twice."""
    try:
        state = {name: tensors.pop(name).to(device=device, dtype=dtype) for name in list(tensors)}
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

    read_json(folder / "config.json", ConfigForm)  # before transformers makes lists of as many layers as it says
    with without_code(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


@contextlib.contextmanager
def without_code(folder: Path) -> Iterator[None]:
    """`UserError` for whatever transformers raises: a file may hold anything, and code in the folder is never run."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError) or not (isinstance(error, Exception) or "Panic" in type(error).__name__):
            raise  # Rust's panics are no `Exception`
        reason = printable(" ".join(str(error).split()))[:150]
        raise UserError(
            f"{folder} cannot be read as a checkpoint, or needs code of its own, which is never run ({reason})"
        ) from None


def load_tokenizer(folder: Path, path: str, rows: int) -> Any:
    """The checkpoint's tokenizer; `UserError` when none of its files exists, it needs code of its own, or it gives
    tokens that an embedding table of `rows` does not have."""
    import transformers
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "vocab.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{path} has no tokenizer: none of {', '.join(names)} exists; copy the tokenizer's files there")
    for file in sorted(folder.iterdir()):  # transformers reads several, and waits for a pipe
        if file.suffix in (".json", ".txt", ".jinja", ".model"):
            require_file(file, MOST_TEXT)
    file = folder / "tokenizer_config.json"
    stored = read_json(file, TokenizerForm) if file.exists() else {}
    with without_code(folder):
        name = (stored.get("tokenizer_class") or "").removesuffix("Fast")
        # transformers 5 takes a generic tokenizer where it has no class of that name
        if "auto_map" in stored and name and not any(hasattr(transformers, name + end) for end in ("", "Fast")):
            raise ValueError(f"{file.name} names the class {name}")
        # transformers 5 stores their names, which 4 cannot read; tokenizer.json has the tokens themselves
        named = transformers.__version__.startswith("4.") and isinstance(stored.get("extra_special_tokens"), list)
        options: dict[str, Any] = {"extra_special_tokens": {}} if named else {}
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        highest = max(tokenizer.get_vocab().values())
        empty, given = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("", "Open the drawer."))
        if not given or highest >= rows or not (empty or isinstance(tokenizer.pad_token_id, int)):
            raise ValueError(
                f"its tokenizer has no pad token, or gives no token or one above the {rows} of the embedding table"
            )
        return tokenizer


def image_statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel from the processor's file (transformers 5: inside processor_config.json)."""
    file = folder / "preprocessor_config.json"
    newer = folder / "processor_config.json"
    where, values = (file, read_json(file)) if file.exists() else (newer, read_json(newer).get("image_processor", {}))
    if not isinstance(values, dict) or "image_mean" not in values or "image_std" not in values:
        raise UserError(f"{folder}: the processor config gives no image_mean and image_std")
    require_form(values, where, StatisticsForm)
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
    if not (index.exists() or index.is_symlink()):
        return {}
    files = read_json(index, IndexForm, "download it again")["weight_map"]
    return {name: file for name, file in files.items() if canonical(name) is not None}
