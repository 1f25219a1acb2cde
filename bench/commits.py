"""Two versions of the code that are compared: this checkout, and a commit whose sources are unpacked."""

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUIET = {
    "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore",
}  # fmt: skip
"""Environment of processes that are measured: threads of all rivals, no network, and no progress bars."""


@dataclass(frozen=True)
class Side:
    """One of two versions of the code: `new` is this checkout, `old` is the commit it is compared with."""

    name: str
    version: str
    """Commit, and a digest of the changes that are not committed."""
    source: Path
    """Folder for PYTHONPATH."""
    out: Path

    @property
    def place(self) -> Path:
        """Folder of the stores and the cache of this side."""
        return self.out / "against" / f"{self.name}-{self.version}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of every process of this side."""
        return {**QUIET, "PYTHONPATH": str(self.source), "OFFRAMP_CACHE": str(self.place / "cache")}


def sides_of(commit: str, out: Path) -> dict[str, Side]:
    """Return both sides; the source of `commit` is unpacked under OUT."""
    sha, head = git("rev-parse", "--short=12", f"{commit}^{{commit}}"), git("rev-parse", "--short=12", "HEAD")
    source = out / "against" / f"source-{sha}"
    if not source.exists():
        partial = source.with_name(source.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        archive = subprocess.run(("git", "archive", sha, "src"), cwd=ROOT, check=True, stdout=subprocess.PIPE)
        subprocess.run(("tar", "-x", "-C", partial), input=archive.stdout, check=True)
        partial.rename(source)
    changes = subprocess.run(("git", "diff", "HEAD", "--", "src"), cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    version = f"{head}-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else head
    return {"old": Side("old", sha, source / "src", out), "new": Side("new", version, ROOT / "src", out)}


def git(*words: str) -> str:
    """Return what git prints of this checkout, without the line end."""
    return subprocess.run(("git", *words), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
