"""Records of studies that were not measured, as `offramp sweep` writes them: equal for equal calls."""

import itertools

import numpy as np

from offramp.experiments import experiment

MIB = 1 << 20
LABELS = ("negative", "positive")
EXITS = ("none", "patience:1", "patience:2", "patience:3", "confidence:0.9", "oracle", "random:patience:2")
ENVIRONMENT = {
    "offramp_version": "0.1.0",
    "python_version": "3.11.7",
    "kernel": "6.1.0",
    "platform": "Linux x86_64",
    "cpu_model": "AMD EPYC",
    "num_cores": 2,
    "total_memory_bytes": 24 << 30,
    "library_versions": {"numpy": "2.4.6", "onnxruntime": "1.32.0"},
    "storage": {"file_system": "ext4", "read_ahead_kb": 8192},
    "caches": {"L1 Data": "32K", "L2 Unified": "1024K"},
    "memory_limit_bytes": None,
    "available_memory_bytes": 19 << 30,
    "load_1min": 0.4,
    "frequency_khz": None,
    "governor": None,
    "throttle_count": None,
}


def study(num_rounds=5, rows=200, traced=False, **axes):
    """Records of all combinations of options: two models with exits, whose early answers are worse."""
    usual = {"model": ["runs/bert", "runs/distilbert"], "task": ["sst2", "mrpc"], "exit": list(EXITS[:5])}
    values = {**usual, "budget": ["96MiB", "128MiB", "resident"], **axes}
    found = []
    for options in itertools.product(*values.values()):
        each = experiment(**dict(zip(values, options, strict=True)), rows=rows, rounds=num_rounds, trace=traced)
        found += [record(each, number) for number in range(1, num_rounds + 1)]
    return found


def record(each, number, failed=None):
    """The record of one round of an experiment; `failed`: its reason."""
    key = each.key({})
    about = {"format": 1, "id": f"{key}.{number}", "key": key, "round": number, "experiment": each.to_json()}
    about |= {
        "inputs": {"model": "d" * 64, "data": "e" * 16, "files": {}},
        "seconds": 12.5,
        "attempts": 1,
        "workers": 1,
    }
    about |= {"git": {"commit": "0123456789abcdef" * 2 + "01234567", "changed_files": 0}}
    about["ended"] = f"2026-11-29T20:{number:02}:09+00:00"
    if failed:
        reason = {"kind": "memory", "what": failed, "where": None, "remedy": "give a larger budget"}
        return {**about, "status": "failed", "reason": reason, "figures": {}, "samples": {}}
    generator = np.random.default_rng(int(key[:8], 16) + number)
    figures, samples = _measured(each, generator)
    run = {"budget_bytes": each.engine.budget_bytes if each.engine.budget != "resident" else 20 << 30}
    return {**about, "status": "done", "figures": figures, "samples": samples, "run": run, "environment": ENVIRONMENT}


def _measured(each, generator):
    num_layers = 6 if "distil" in each.model else 12
    exits, answers, truth = _answers(each, num_layers)
    budget = each.engine.budget if isinstance(each.engine.budget, int) else 0
    streamed = max(0.0, 1 - budget / (400 * MIB)) if budget else 0.0
    layer_seconds = 0.0021 * (1 + 2.4 * streamed) * float(generator.normal(1, 0.03))
    latencies = 0.002 + layer_seconds * exits * generator.gamma(60, 1 / 60, len(exits))
    peak = (budget * 0.97 if budget else 38 * MIB + num_layers * 28 * MIB) + generator.integers(0, MIB)
    found = {"latency": float(np.median(latencies)), "latency_p95": float(np.percentile(latencies, 95))}
    found |= {
        "memory": int(peak),
        "predicted_memory": int(peak * 1.015),
        "bytes": streamed * 28 * MIB * float(exits.mean()),
    }
    found |= {
        "bound": 0.002 + 0.0019 * float(np.median(exits)) * (1 + 2.1 * streamed),
        "mean_exit": float(exits.mean()),
    }
    accuracy = 100 * float((answers == truth).mean())
    found |= {"accuracy": accuracy, "score": accuracy, "time_per_input": float(latencies.mean())}
    samples = {"latencies": latencies.tolist(), "exits": exits.tolist(), "answers": answers.tolist()}
    samples |= {"truth": truth.tolist(), "metrics": ["accuracy"], "labels": list(LABELS)}
    if each.trace:
        samples |= _trace(num_layers, float(layer_seconds), int(peak), streamed, exits[:3])
    return found, samples


def _answers(each, num_layers):
    """The exit and the answer of each row: equal in all rounds, budgets and backends."""
    seed = [len(each.model), len(str(each.data and each.data.task)), len(each.engine.exit), each.seed or 0]
    generator, shared = np.random.default_rng(seed), np.random.default_rng(seed[:2])
    truth, hard = shared.integers(0, 2, each.rows), shared.random(each.rows)
    rule = each.engine.exit.removeprefix("random:")
    depth = {"none": 1.0, "oracle": 0.35}.get(rule, 0.45 + 0.11 * int(rule[-1]) if rule[-1].isdigit() else 0.6)
    exits = np.clip(np.round(num_layers * depth * (0.55 + 0.9 * hard)), 1, num_layers).astype(int)
    exits = np.full(each.rows, num_layers) if rule == "none" else exits
    wrong = 0.1 + 0.3 * hard * (1 - exits / num_layers) ** 1.2
    return exits, np.where(generator.random(each.rows) < wrong, 1 - truth, truth), truth


def _trace(num_layers, layer_seconds, peak, streamed, exits):
    """Samples of memory and spans of three passes, which begin half a second after the process."""
    spans, clock, rise = [], 100.5, 1 - 60 * MIB / peak
    for index, last in enumerate(exits):
        for stage in range(int(last)):
            name, read = f"layer-{stage:02}", layer_seconds * (0.9 + 0.2 * streamed)
            if streamed:
                spans.append([name, stage, "read", clock - read * 0.6, clock + read * 0.35, 28 * MIB, "reader", index])
                spans.append([name, stage, "wait", clock, clock + read * 0.35, 0, "loop", index])
                clock += read * 0.35
            spans.append([name, stage, "compute", clock, clock + layer_seconds * 0.8, 0, "loop", index])
            spans.append([name, stage, "head", clock + layer_seconds * 0.8, clock + layer_seconds, 0, "loop", index])
            clock += layer_seconds
    seconds = np.arange(100.0, clock, 0.002)
    ramp = np.clip((seconds - 100.0) / 0.45, 0, 1)
    wave = 0.03 * np.sin((seconds - 100.5) * 6.28 / (2 * layer_seconds)) * (seconds > 100.5)
    rss = peak * np.clip(1 - rise + ramp * (rise - 0.03) + wave, 0, 1)
    memory = [[float(t), int(r), int(r * 0.7), int(r * 0.3)] for t, r in zip(seconds, rss, strict=True)]
    return {"memory": memory, "spans": spans}
