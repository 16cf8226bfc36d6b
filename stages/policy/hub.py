"""Policies on the Hugging Face hub: pushed as `dvla export` writes them, with a card.

The token is the hub client's own (`hf auth login`, or HF_TOKEN); it is never an argument here, and never printed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ...common.documents import read_json
from ...common.files import write_file
from ...common.hub import hub_errors
from ...errors import UserError
from .card import policy_card
from .checkpoint import StateForm
from .document import read_document
from .evaluation import read_summary
from .export import export_policy


def push_policy(
    path: str | Path,
    repo: str,
    private: bool = True,
    evaluations: Sequence[str | Path] = (),
    vlm_path: str | None = None,
    formats: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> str:
    """Upload a policy to a model repository of the hub, which is made if needed; returns its URL.

    Args:
        path: a run, a checkpoint, or an exported policy.
        repo: "owner/name".
        evaluations: folders that `dvla eval --out` wrote, for the card.
        vlm_path, formats: as in `export_policy`.

    Raises:
        UserError: the policy or an evaluation is missing or damaged, or the hub refuses.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"'{repo}' is not a repository of the hub; give owner/name")
    summaries = [read_summary(Path(folder)) for folder in evaluations]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "policy"
        export_policy(path, folder, formats, vlm_path, say)
        document, state = read_document(folder), read_json(folder / "state.json", StateForm)
        base = document["encoder"]["spec"]["path"]
        if Path(base).expanduser().exists():
            say(f"the policy names its VLM as the folder {base}: users of {repo} give their own with vlm_path")
        write_file(folder / "README.md", policy_card(document, state, repo, summaries).encode())
        with hub_errors(repo):
            from huggingface_hub import HfApi

            api = HfApi()
            url = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                repo_type="model",
                commit_message=f"Policy of step {state.get('step')}",
            )
    return str(url)
