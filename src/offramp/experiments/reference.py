"""The reference of the demo: the same run folder in transformers, whole in memory."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from offramp.measure import median, num_cores, read_memory
from offramp.runtime.config import EngineConfig


def classify(folder: str, texts: Iterable[Any], config: EngineConfig) -> dict[str, Any]:
    """Classify texts and pairs of texts one by one; return `results` and the `record`, as a run of a store does.

    Of `config`, `max_length` and `threads` are used.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(config.threads or num_cores())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    latencies, results = [], []
    for text in texts:
        started = time.perf_counter()
        with torch.inference_mode():
            parts = (text,) if isinstance(text, str) else text
            inputs = tokenizer(*parts, truncation=True, max_length=config.max_length, return_tensors="pt")
            probability_C = model(**inputs).logits[0].softmax(0)
        latencies.append(time.perf_counter() - started)
        best = int(probability_C.argmax())
        results.append({"label": model.config.id2label[best], "score": float(probability_C[best])})
    record = {
        "latency_seconds_median": median(latencies),
        "seconds_total": sum(latencies),
        "peak_rss_bytes": read_memory().peak_bytes,
        "num_inputs": len(latencies),
    }
    return {"results": results, "record": record}
