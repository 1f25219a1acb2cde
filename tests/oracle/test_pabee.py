"""PABEE, written once more from its definition, one sample at a time: replayed transcripts and the streamed engine must
leave where it leaves, and answer what it answers.

Zhou et al., "BERT Loses Patience: Fast and Robust Inference with Early Exit", NeurIPS 2020, section 3.2: a counter of
consecutive layers that give the same prediction (in a regression: within a distance of the one before); leave when it
reaches the patience; the last layer ends it.

Shapes: K exits, N samples, C outputs of a head.
"""

import math

import numpy as np
import pytest
import torch

import offramp
from offramp.checkpoints.exits import ModelWithExits
from offramp.experiments.evaluation import EvalSettings, evaluate
from offramp.policies import parse, replay
from offramp.policies.evidence import REGRESSION, SINGLE_LABEL
from offramp.store.transcript import read_transcript
from offramp.tasks.examples import Example, Splits
from offramp.training.subjects import save_model
from tests.training.tiny import LABELS, VOCABULARY, WORDS, make_model

NUM_LAYERS, NUM_TEXTS = 5, 64


def pabee(logits_KC, patience, tau=None):
    """(exit, from 1; output [C]) of one sample."""
    count, before = 0, None
    for number, logits_C in enumerate(logits_KC, 1):
        now = logits_C[0] if tau is not None else int(np.argmax(logits_C))
        if before is None:
            agrees = False
        elif tau is None:
            agrees = now == before
        else:
            agrees = abs(now - before) < tau
        count = count + 1 if agrees else 0
        before = now
        if count == patience:
            return number, logits_C
    return len(logits_KC), logits_KC[-1]


def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(NUM_TEXTS)]


@pytest.fixture(scope="module", params=[("bert", "single"), ("distilbert", "single"), ("bert", "regression")], ids=str)
def transcribed(request, tmp_path_factory):
    """(run folder, its store, data, its transcript) of a model whose exits disagree often."""
    model_type, kind = request.param
    folder = tmp_path_factory.mktemp("pabee")
    changes = {"num_labels": 1, "problem_type": REGRESSION} if kind == "regression" else {"problem_type": SINGLE_LABEL}
    changes["num_hidden_layers"] = NUM_LAYERS
    names = ["score"] if kind == "regression" else list(LABELS)
    model = ModelWithExits(make_model(model_type, **changes))
    model.model.config.id2label = dict(enumerate(names))
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.normal_(std=0.2)
    if kind == "regression":
        standardise(model, texts())
    save_model(model, folder / "run")
    (folder / "run" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    labels = () if kind == "regression" else LABELS
    metrics = ("accuracy",) if labels else ("pearson",)
    examples = [Example(text, number % 3 if labels else number / 10) for number, text in enumerate(texts())]
    data = Splits("toy", labels, metrics, {"dev": examples})
    evaluate(
        folder / "run", data, ["dev"], EvalSettings(transcript=folder / "kept", batch_size=16), log=lambda line: None
    )
    store = offramp.divide(folder / "run", folder / "store")
    return store, data, read_transcript(folder / "kept", "dev")


@torch.no_grad()
def standardise(model, given):
    """Give the values of each exit mean 0 and spread 1: as they come, they lie far apart for every sample alike."""
    encode = {word: number for number, word in enumerate(VOCABULARY)}
    rows = [torch.tensor([[2, *(encode[word] for word in text.split()), 3]]) for text in given]
    values_NK = torch.stack(
        [torch.cat(model.eval()(input_ids=row, attention_mask=torch.ones_like(row)), 1)[0] for row in rows]
    )
    for head, mean, spread in zip(model.heads, values_NK.mean(0), values_NK.std(0), strict=False):
        head.exit.weight /= spread
        head.exit.bias.copy_((head.exit.bias - mean) / spread)


def policies(transcript):
    """(patience, tau, policy); of a regression, tau is such that half of the samples agree at an exit and the next."""
    taus = [None]
    if transcript.about.problem == REGRESSION:
        distances_NK = np.abs(np.diff(transcript.logits_NKC[:, :, 0]))
        taus = [round(float(tau), 4) for tau in np.median(distances_NK, axis=0)]
    found = [(math.inf, taus[0], "patience:inf")]
    for tau in taus:
        suffix = "" if tau is None else f"@{tau}"
        found += [(patience, tau, f"patience:{patience}{suffix}") for patience in range(1, NUM_LAYERS)]
    return found


def test_the_toy_is_worth_the_trouble(transcribed):
    _, _, transcript = transcribed
    ones = [tau for patience, tau, _ in policies(transcript) if patience == 1]
    exits = [{pabee(logits_KC, 1, tau)[0] for logits_KC in transcript.logits_NKC} for tau in ones]
    assert max(map(len, exits)) >= 2, "samples leave at different exits"
    assert len(set.union(*exits)) >= 3


def test_replayed_patience_is_pabee(transcribed):
    _, _, transcript = transcribed
    logits_KNC = transcript.logits_NKC.swapaxes(0, 1)
    for patience, tau, policy in policies(transcript):
        expected = [pabee(logits_KC, patience, tau)[0] for logits_KC in transcript.logits_NKC]
        assert replay(parse(policy), logits_KNC, transcript.about.problem).tolist() == expected, policy


@pytest.mark.parametrize("batch", [1, 7])
def test_the_streamed_engine_leaves_where_pabee_leaves(transcribed, batch):
    """For every sample, but where two outputs are so near to the rule that the last bits decide."""
    store, data, transcript = transcribed
    given = [example.text for example in data.examples["dev"]]
    for patience, tau, policy in policies(transcript):
        with offramp.load(store, exit=policy, batch=batch) as classifier:
            results = [
                result
                for start in range(0, len(given), batch)
                for result in classifier.predict(given[start : start + batch])
            ]
        for number, (result, logits_KC) in enumerate(zip(results, transcript.logits_NKC, strict=True)):
            exit_stage, output_C = pabee(logits_KC, patience, tau)
            assert result.exit_stage == exit_stage or near(logits_KC, tau), (policy, number)
            if result.exit_stage == exit_stage and tau is None:
                assert result.label == LABELS[int(output_C.argmax())]


def near(logits_KC, tau):
    """Whether rounding may decide: two best outputs, or a distance and tau, within 1e-4."""
    if tau is not None:
        return bool((np.abs(np.abs(np.diff(logits_KC[:, 0])) - tau) < 1e-4).any())
    best = np.sort(logits_KC, axis=1)
    return bool((best[:, -1] - best[:, -2] < 1e-4).any())
