"""Share the encoder of a run on the Hugging Face hub; `FeatureExtractor.from_pretrained` fetches it there."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastreid_uns.errors import InvalidState, MissingPackage
from fastreid_uns.predictor import FeatureExtractor
from fastreid_uns.published import CARD, HUB, hub_failures


def push(run: str | Path, repo: str, *, private: bool = True, trust: bool = False, plugins: Sequence[str] = ()) -> str:
    """Upload the encoder of a run: `push("output/demo", "user/name")`.

    It goes as `FeatureExtractor.save_pretrained` writes it. A card that is there already stays.

    Args:
        run: a checkpoint, or the OUTPUT_DIR of a run, also of grouped photos.
        repo: `user/name`; it is made if it is not there.
        private: who sees a new repository: its owner alone, or everybody. One that is there stays as it is.
        trust, plugins: whose code may run, see `predictor.load_run`.

    Returns:
        What `FeatureExtractor.from_pretrained` takes: `hub:user/name`.

    Raises:
        MissingPackage: huggingface_hub is not installed.
        InvalidState: the hub refuses it or cannot be reached.
        MissingFile, InvalidValue, UnknownName: as `load_run`.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise MissingPackage("hub: needs huggingface_hub. Run pip install 'fastreid_uns[hub]'.") from error
    source = f"{HUB}{repo.removeprefix(HUB)}"
    extractor = FeatureExtractor.from_checkpoint(run, trust=trust, plugins=plugins, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        extractor.save_pretrained(folder, source=source)
        try:
            _upload(HfApi(), folder, source.removeprefix(HUB), private)
        except hub_failures() as error:
            raise InvalidState(
                f"hub: {repo} could not be written ({error}). Check the name as user/name, the network, and "
                f"`hf auth login` with a token that may write."
            ) from error
    return source


def _upload(api, folder: str, repo: str, private: bool) -> None:
    api.create_repo(repo, private=private, exist_ok=True)
    kept = [CARD] if api.file_exists(repo, CARD) else []
    api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=kept, commit_message="Encoder of fastreid_uns")
