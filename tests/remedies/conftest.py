"""What entries need, made once: models, stores, tables, tuned policies; and the folder in which each is carried out."""

import shutil
from functools import cached_property

import numpy as np
import pytest

import offramp
from offramp.runtime.ledger import LEDGER
from tests.cli.conftest import write_tiny
from tests.golden.common import TUNED, unpack
from tests.remedies.entries import Bench

ROWS = [f"the {one} {other}" for one in ("bank", "film", "match") for other in ("rose", "fell", "won", "lost")]
KINDS = ("business", "film", "sport")


class Made:
    """Folders and files that entries copy, by name; each is made at its first use."""

    NAMES = ("model", "plain", "store", "bare", "tuned", "transcripts", "profile.json", "policy.json", "mine.tsv")
    NAMES += ("texts.txt", "regression", "values.tsv", "encoder", "run", "images", "eager", "export")

    def __init__(self, folder):
        self.folder = folder

    def __getattr__(self, name):
        if name in self.NAMES:
            return getattr(self, "make_" + name.replace(".", "_"))
        raise AttributeError(name)

    @cached_property
    def make_model(self):
        return write_tiny(self.folder / "model")

    @cached_property
    def make_plain(self):
        """A model without exits."""
        return write_tiny(self.folder / "plain", exits=False)

    @cached_property
    def make_store(self):
        return offramp.divide(self.make_model, self.folder / "store")

    @cached_property
    def make_bare(self):
        """A store without exits."""
        return offramp.divide(self.make_plain, self.folder / "bare")

    @cached_property
    def make_regression(self):
        return write_tiny(self.folder / "regression", id2label={"0": "score"}, exits=False)

    @cached_property
    def make_encoder(self):
        """A model of transformers without a head."""
        from tests.training.tiny import make_model, write_checkpoint

        return write_checkpoint(self.folder / "encoder", make_model("bert").base_model)

    @cached_property
    def make_run(self):
        """A run folder, trained for a moment."""
        from offramp.training import TrainSettings, train_exits
        from tests.training.tiny import LABELS, examples

        settings = TrainSettings(epochs=1, heads_epochs=1, batch_size=8, max_length=16)
        rows = examples(16), examples(8, seed=1)
        train_exits(self.make_encoder, *rows, self.folder / "run", labels=LABELS, settings=settings)
        return self.folder / "run"

    @cached_property
    def make_eager(self):
        """The store of a module that runs by `offramp.stream` only."""
        return offramp.divide(self.make_plain, self.folder / "eager", method="eager")

    @cached_property
    def make_export(self):
        """The store of a module whose stages are graphs."""
        return offramp.divide(self.make_plain, self.folder / "export", method="export")

    @cached_property
    def make_tuned(self):
        """The golden store that the transcripts, the profile and the policy are of."""
        return unpack("bert-tuned", self.folder / "golden")

    @cached_property
    def make_transcripts(self):
        target = self.folder / "transcripts"
        target.mkdir()
        for name in ("tune", "certify"):
            for suffix in (".json", ".safetensors"):
                shutil.copy(TUNED / (name + suffix), target)
        return target

    @property
    def make_profile_json(self):
        return TUNED / "profile.json"

    @property
    def make_policy_json(self):
        return TUNED / "policy.json"

    @cached_property
    def make_mine_tsv(self):
        rows = [f"{text}\t{KINDS[number % 3]}\n" for number, text in enumerate(ROWS * 6)]
        rows = [row.replace("\t", f" {number}\t") for number, row in enumerate(rows)]
        return self._written("mine.tsv", "sentence\tlabel\n" + "".join(rows))

    @cached_property
    def make_values_tsv(self):
        rows = [f"{text} {number}\t{number % 5}.5\n" for number, text in enumerate(ROWS * 6)]
        return self._written("values.tsv", "sentence\tlabel\n" + "".join(rows))

    @cached_property
    def make_texts_txt(self):
        return self._written("texts.txt", "a film won\nthe bank fell\n")

    @cached_property
    def make_images(self):
        from PIL import Image

        rng = np.random.default_rng(0)
        for number in range(4):
            place = self.folder / "images" / ("cat", "dog")[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
        return self.folder / "images"

    def _written(self, name, text):
        path = self.folder / name
        path.write_text(text)
        return path


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("made"))


@pytest.fixture
def w(made, tmp_path, monkeypatch):
    """The working folder of an entry."""
    place = tmp_path / "w"
    place.mkdir()
    with monkeypatch.context() as patches:
        bench = Bench(place, made, patches)
        yield bench
        bench.let_go()
    for engine in list(LEDGER._shares):  # an action may open one to show that it can
        engine.close()
