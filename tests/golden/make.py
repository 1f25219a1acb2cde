"""Tiny random models and their stores, for the golden files. `write.py` calls `make_stores` and `make_tuned` once.

Every model has three layers, so its exits are 1, 2 and 3 (the model's own head). Weights are drawn with a larger spread
than usual: answers then differ from input to input and from exit to exit.
"""

import json
from dataclasses import dataclass

import tokenizers
import torch
import transformers as hf
from offramp.models.exits import ModelWithExits
from offramp.models.points import ModuleWithExits, points_of
from safetensors.torch import save_file

import offramp
from offramp.cli import main
from offramp.store.exits import DEFAULT_FORM, describe_exits
from offramp.training import TrainSettings, train_exits
from tests.golden import modules

NUM_LAYERS, WIDTH = 3, 8
WORDS = ("red", "green", "blue", "the", "sky", "is", "grass", "of", "a", "rose", "##s", "##ish")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
COLOURS = ("red", "green", "blue")
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
SPREAD, MIN_SPREAD = 0.4, 0.15
"""Standard deviation of the noise that is added to matrices, and to vectors."""
SIDE = 8
"""Height and width of an image in pixels."""
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
QUICK = TrainSettings(epochs=2, heads_epochs=2, batch_size=16, learning_rate=1e-2, max_length=16)


@dataclass(frozen=True)
class Encoder:
    """A classifier that is divided by the names of its tensors."""

    family: str
    form: str = ""
    """Form of the exit heads; "" for a model without exits."""
    problem: str = SINGLE
    activation: str = "gelu"
    has_head: bool = True
    dtype: torch.dtype = torch.float32

    def config(self):
        labels = ("score",) if self.problem == REGRESSION else COLOURS
        kwargs = {
            "vocab_size": 300 if self.family == "roberta" else len(VOCABULARY),
            "max_position_embeddings": 20, "problem_type": self.problem, "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }  # fmt: skip
        if self.family == "distilbert":
            shape = {"dim": WIDTH, "n_layers": NUM_LAYERS, "n_heads": 2, "hidden_dim": 2 * WIDTH}
            return hf.DistilBertConfig(activation=self.activation, **shape, **kwargs)
        kwargs |= {"hidden_size": WIDTH, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2}
        kwargs |= {"intermediate_size": 2 * WIDTH, "hidden_act": self.activation}
        if self.family == "electra":
            kwargs["embedding_size"] = WIDTH // 2
        if self.family == "roberta":
            kwargs |= {"type_vocab_size": 1, "pad_token_id": 1}
        return hf.AutoConfig.for_model(self.family, **kwargs)


ENCODERS = {
    "bert-own-shared": Encoder("bert", "own-shared", activation="gelu_new"),
    "bert-regression": Encoder("bert", "mean-linear", REGRESSION, "relu"),
    "bert-bfloat16": Encoder("bert", dtype=torch.bfloat16),
    "bert-headless": Encoder("bert", has_head=False),
    "distilbert": Encoder("distilbert"),
    "distilbert-multi-label": Encoder("distilbert", "mean-linear", MULTI, "silu"),
    "roberta-cls-linear": Encoder("roberta", "cls-linear", activation="gelu_pytorch_tanh"),
    "electra-own": Encoder("electra", "own"),
}


def make_stores(stores, scratch):
    """Write all stores into the folder `stores`, and the models into `scratch`."""
    hf.utils.logging.disable_progress_bar()
    for name, encoder in ENCODERS.items():
        write_encoder(scratch / name, encoder)
        offramp.divide(scratch / name, stores / name, method="names")
    for name in ("albert", "gpt2"):
        write_trained_text(scratch / name, name)
        offramp.divide(scratch / name / "run", stores / f"{name}-export")
    for name in ("vit", "resnet"):
        write_vision(scratch / name, name)
        offramp.divide(scratch / name, stores / f"{name}-export")
    divide_sum(stores / "arrays-export", scratch)
    offramp.divide(scrambled(modules.Tied), torch.tensor([[1, 2, 3, 4]]), stores / "tied-eager")
    write_gpt2(scratch / "gpt2-lm")
    offramp.divide(scratch / "gpt2-lm", stores / "gpt2-eager", method="eager")


def scramble(model, seed=0):
    """Add noise to every weight of the model and switch it to evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = SPREAD if parameter.ndim > 1 else MIN_SPREAD
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def write_wordpiece(folder):
    """Write the `vocab.txt` of a WordPiece tokenizer."""
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


def write_byte_pairs(folder):
    """Write `vocab.json` and `merges.txt` of a byte-level tokenizer of RoBERTa."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    text = ["the red sky is a green rose of the blue grass"] * 8
    bpe.train_from_iterator(text, vocab_size=300, min_frequency=2, special_tokens=specials, show_progress=False)
    bpe.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))


def write_encoder(folder, encoder):
    """Write a model folder with a tokenizer and, where the encoder names a form, random exits."""
    torch.manual_seed(0)
    auto = hf.AutoModelForSequenceClassification if encoder.has_head else hf.AutoModel
    model = scramble(auto.from_config(encoder.config()))
    model.to(encoder.dtype).save_pretrained(folder)
    (write_byte_pairs if encoder.family == "roberta" else write_wordpiece)(folder)
    if not encoder.form:
        return
    exits = scramble(ModelWithExits(model, encoder.form), seed=1)
    model.save_pretrained(folder)
    write_exits(folder, exits, encoder.form)


def write_exits(folder, model, form, points=()):
    """Write the exit heads of a model beside it."""
    save_file(model.exit_tensors(), folder / "exits.safetensors")
    num_exits = len(points) + 1 if points else NUM_LAYERS
    (folder / "exits.json").write_bytes(describe_exits(form, num_exits, points))


def examples(num, seed=0):
    """Return texts of two to four words, each with one colour, and the index of the colour."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1 << 20, (num, 4), generator=generator).tolist()
    others = WORDS[3:10]
    found = []
    for index, (count, *words) in enumerate(drawn):
        text = [others[word % len(others)] for word in words[: 1 + count % 3]]
        text.insert(count % (len(text) + 1), COLOURS[index % 3])
        found.append((" ".join(text), index % 3))
    return found


def write_trained_text(folder, family):
    """Write a classifier of a family that is divided by a run, and train its exits in `folder/run`."""
    common = {
        "vocab_size": len(VOCABULARY), "pad_token_id": 0, "id2label": dict(enumerate(COLOURS)),
        "label2id": {label: index for index, label in enumerate(COLOURS)},
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "albert":
        shape = {"hidden_size": WIDTH, "embedding_size": 4, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2}
        shape |= {"intermediate_size": 2 * WIDTH, "max_position_embeddings": 20}
        model = hf.AlbertForSequenceClassification(hf.AlbertConfig(**shape, **common))
    else:
        shape = {"n_embd": WIDTH, "n_layer": NUM_LAYERS, "n_head": 2, "n_positions": 20}
        model = hf.GPT2ForSequenceClassification(hf.GPT2Config(**shape, **common, bos_token_id=2, eos_token_id=3))
    scramble(model).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    hf.BertTokenizerFast.from_pretrained(folder, model_max_length=16).save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)
    train_exits(folder, examples(48), examples(12, seed=1), folder / "run", labels=COLOURS, settings=QUICK)


def write_vision(folder, name):
    """Write a classifier of images with an image processor and random exits wherever an exit can stand."""
    labels = ("bird", "cat", "dog")
    common = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    torch.manual_seed(0)
    if name == "vit":
        shape = {"hidden_size": WIDTH, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2}
        shape |= {"intermediate_size": 2 * WIDTH, "image_size": SIDE, "patch_size": 4}
        model = hf.ViTForImageClassification(hf.ViTConfig(**shape, **common))
    else:
        shape = {"embedding_size": 4, "hidden_sizes": [4, 6, 8], "depths": [1, 1, 1], "layer_type": "basic"}
        model = hf.ResNetForImageClassification(hf.ResNetConfig(**shape, **common))
    scramble(model).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    pixels = {"pixel_values": torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))}
    exits = ModuleWithExits(model, points_of(model, pixels))
    for number, head in enumerate(exits.heads):
        scramble(head, seed=number)
    points = [(call.module, call.number, width) for call, width in exits.points]
    write_exits(folder, exits, DEFAULT_FORM, points)


def scrambled(make):
    """Return a module with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return scramble(make())


def divide_sum(store, scratch):
    """Train exits on the classifier of arrays, and divide it."""
    module = scrambled(modules.Sum)
    generator = torch.Generator().manual_seed(0)
    numbers, words = torch.randn(64, 4, generator=generator), torch.arange(64) * 7 % 20
    rows = [({"numbers": numbers[i], "word": words[i]}, int(numbers[i, :3].argmax())) for i in range(64)]
    run = scratch / "sum"
    train_exits(module, rows[:48], rows[48:], run, labels=modules.LABELS, settings=QUICK)
    offramp.divide(module, {"numbers": numbers[:2], "word": words[:2]}, store, exits=run)


def write_gpt2(folder):
    """Write a language model of transformers with tied embeddings."""
    shape = {"n_embd": WIDTH, "n_layer": NUM_LAYERS, "n_head": 2, "n_positions": 16, "vocab_size": 20}
    torch.manual_seed(0)
    scramble(hf.GPT2LMHeadModel(hf.GPT2Config(**shape, bos_token_id=0, eos_token_id=1))).save_pretrained(folder)


def make_tuned(stores, tuned, scratch):
    """Train, divide, score and tune one BERT by the command line; keep policy, device profile and transcripts."""
    encoder = Encoder("bert")
    write_encoder(scratch / "encoder", encoder)
    rows = [f"{text} {number}\t{COLOURS[label]}\n" for number, (text, label) in enumerate(examples(600))]
    (scratch / "mine.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    store, table = stores / "bert-tuned", ("--train", scratch / "mine.tsv")
    brief = ("--max-length", 16)
    call("train", scratch / "encoder", *table, "--out", scratch / "run", "--epochs", 2, "--lr", "1e-2", *brief)
    call("divide", scratch / "run", store)
    call("eval", store, *table, "--split", "tune,certify", "--transcript", tuned)
    profile = tuned / "profile.json"
    call("bench", store, "--save-profile", profile, *brief)
    seconds = json.loads(profile.read_text())["seconds"][0]
    middle = f"{1e6 * (seconds[0] + seconds[-1]) / 2:.0f}us"
    words = ("tune", store, "--transcript", tuned, "--profile", profile)
    call(*words, "--latency", middle, "--out", tuned / "policy.json")
    call(*words, "--max-drop", 20, "--confidence", 0.8, "--out", tuned / "certified.json")


def call(verb, *words):
    """Run a verb of the command line in this process. Raises RuntimeError if it fails."""
    if main([verb, *map(str, words)]):
        raise RuntimeError(f"offramp {verb} failed")
