"""Put an archive on the Hugging Face Hub, and get one from there. Nothing else in this project uses the network."""

import argparse
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from system.errors import UserError

PREFIX = "hf://"
ARCHIVE = "model.pth"
NAME = r"\w[\w.-]*"  # of a user, a repository, a folder or a file
REPOSITORY = re.compile(f"{NAME}/{NAME}")
ADDRESS = re.compile(rf"hf://(?P<repository>{REPOSITORY.pattern})(/(?P<file>{NAME}(/{NAME})*))?(@(?P<revision>\S+))?")
# Names that the Hub knows; others are told there as 'other' with their name.
LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
            "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "openrail")
INSTALL = "needs the package huggingface_hub, which is not installed. pip install -r requirements-hub.txt"


def repository_name(text: str) -> str:
    """Check the name of a repository: 'USER/NAME'."""
    if not REPOSITORY.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no repository of the Hub; it is named USER/NAME")
    return text


def push(repository: str, archive: Path, card: str, licence: str, private: bool) -> str:
    """Upload an archive and its model card in one commit; return the address of that commit.

    The repository is made if it is not there. The token is that of `hf auth login` or of HF_TOKEN.

    Args:
        repository: as `repository_name` takes it.
        card: in Markdown; README.md of the repository, with a licence and tags that the Hub searches.
    Raises:
        UserError: without the package, a token, the right to write, or a connection.
    """
    api = _hub().HfApi()
    files = {ARCHIVE: archive, "README.md": (_front_matter(licence) + card).encode()}
    with _explained(repository, "Log in by 'hf auth login', or set HF_TOKEN to a token that may write"):
        api.create_repo(repository, private=private or None, exist_ok=True)
        commit = api.create_commit(repository, [
            _hub().CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()],
            commit_message="Archive and model card")
    return str(commit.commit_url)


def pull(address: str, folder: Path) -> Path:
    """Download an archive into a folder and return its path; it is not loaded here.

    Args:
        address: 'hf://USER/NAME', and behind it '/FILE' for another file than model.pth and '@REVISION'.
    Raises:
        UserError: for another address, without the package or a connection, or if nothing is there.
    """
    match = ADDRESS.fullmatch(address)
    if not match:
        raise UserError(f"{address}: an address of the Hub is hf://USER/NAME, hf://USER/NAME/FILE, or either with "
                        f"@REVISION behind it")
    with _explained(address, "Check the address; for a private repository log in by 'hf auth login'"):
        return Path(_hub().hf_hub_download(match["repository"], match["file"] or ARCHIVE,
                                           revision=match["revision"], local_dir=folder))


def _hub():
    """Return the package."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"The Hub {INSTALL}") from None
    return huggingface_hub


@contextlib.contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
    """Turn what the Hub or the connection refuses into a UserError: what was asked for, why not, and a remedy."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, *_refusals()) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"{what}: {' '.join(lines[:2]).rstrip('.')}. {remedy}") from None


def _refusals() -> tuple[type[Exception], ...]:
    """Return what the package's errors are of: OSError, and the errors of whichever library carries its requests."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def _front_matter(licence: str) -> str:
    """Return what the Hub reads of a card: kind of task, tags and licence."""
    name = re.sub(r"[\s_]+", "-", licence.strip().lower())
    known = {"license": name} if name in LICENCES else \
        {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]", "", name) or "other"} if name else {}
    data = _hub().ModelCardData(pipeline_tag="image-segmentation", library_name="pytorch",
                                tags=["u-net", "nuclei", "microscopy"], **known)
    return f"---\n{data.to_yaml()}\n---\n\n"
