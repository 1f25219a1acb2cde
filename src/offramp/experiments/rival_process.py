# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# Its imports are libraries of other environments.
"""The process of one rival: `PYTHON rival_process.py`, started by path in the rival's own environment.

It imports the standard library and the rival, never offramp. It reads one JSON job on stdin and prints one JSON line:
`{"result": tree}` or `{"failed": reason}`; whatever libraries print goes to stderr. Jobs by their key `act`:

- `versions`: versions of the distributions in `distributions`; None for one that is not installed.
- `prepare`: convert the model into the folder `out`, as `form` says.
- `measure`: load the model, run `inputs` one by one, and describe the passes after the first `warm`.

Keeps to Python 3.8, the oldest that a rival may bring.

Shapes: S tokens, C labels.
"""

import ctypes
import inspect
import json
import os
import signal
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ONNX = "model.onnx"
HEAD = "head.json"
"""Weights of the layers behind the encoder, beside a converted model whose runtime has no such layers."""


def main():
    """Run the job on stdin."""
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]  # files beside this one
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: end with the parent
    job, output = json.load(sys.stdin), os.dup(1)
    if "parent" in job and is_orphan(job["parent"]):  # it ended before the call of prctl
        return
    os.dup2(2, 1)
    try:
        found = {"result": {"versions": versions, "prepare": prepare, "measure": measure}[job["act"]](job)}
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no message"]
        found = {"failed": f"{type(error).__name__}: {lines[0][:300]}"}
    os.write(output, json.dumps(found).encode() + b"\n")
    os._exit(0)  # a library's threads may hang while Python ends


def is_orphan(parent):
    """Return whether the process `parent` has ended. It may be a grandparent: of a script that starts Python."""
    if os.getppid() == parent or sys.platform != "linux":
        return os.getppid() != parent
    try:
        return Path("/proc/%d/stat" % parent).read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def versions(job):
    """Return the version of each distribution."""
    return {name: _version(name) for name in job["distributions"]}


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def prepare(job):
    """Convert the model, or the form in the folder `source`, into the new folder `out`."""
    Path(job["out"]).mkdir()
    FORMS[job["form"]](job, job["out"])
    return {}


def measure(job):
    """Load, warm up, and time the passes."""
    return timed(job, *RIVALS[job["rival"]](job))


def timed(job, run, finish):
    """Time the passes. `finish` turns what a pass returned into logits, after all measurements."""
    seconds, found, first_byte = [], [], 0
    for index, (ids_S, types_S) in enumerate(job["inputs"]):
        if index == job["warm"]:
            first_byte = bytes_read()
        started = time.perf_counter()
        found.append(run(ids_S, types_S))
        seconds.append(time.perf_counter() - started)
    num_timed = len(seconds) - job["warm"]
    return {
        "latencies_seconds": seconds[job["warm"] :],
        "bytes_read_per_input": (bytes_read() - first_byte) / num_timed,
        "peak_rss_bytes": memory_bytes("VmHWM"),
        "precision": job["precision"],
        "logits": [[float(value) for value in finish(each)] for each in found],
    }


def memory_bytes(field):
    """Return `VmHWM`, the peak, or `VmRSS`, the present resident set of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def bytes_read():
    """Return the bytes that read calls have returned so far; pages of mapped files are not among them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def _same(value):
    return value


# Rivals: each loads the model and returns `run(ids_S, types_S)` and `finish`. -----------------------------------------


def classifier(job, **options):
    """Return transformers' classifier of the model folder."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(job.get("threads") or 1)
    load = AutoModelForSequenceClassification.from_pretrained
    return load(job["model"], local_files_only=True, **options).eval()


def _parameters(model):
    return inspect.signature(model.forward).parameters


def passes(model):
    """Return `run` and `finish` of a classifier of transformers."""
    import torch

    accepts_types = "token_type_ids" in _parameters(model)

    def run(ids_S, types_S):
        given = {"input_ids": torch.tensor([ids_S]), "attention_mask": torch.ones(1, len(ids_S), dtype=torch.int64)}
        if accepts_types:
            given["token_type_ids"] = torch.tensor([types_S])
        with torch.inference_mode():
            return model(**given).logits[0].float().tolist()

    return run, _same


def transformers(job):
    """transformers, all weights in memory."""
    return passes(classifier(job))


def transformers_bf16(job):
    """transformers, all weights in memory as bfloat16."""
    import torch

    return passes(classifier(job, dtype=torch.bfloat16))


def disk(job):
    """transformers and accelerate: every weight is left on disk, and loaded module by module."""
    return passes(classifier(job, device_map={"": "disk"}, offload_folder=job["scratch"]))


def disk_offload(job):
    """transformers and accelerate: loaded whole, then every weight is written to disk, and loaded module by module."""
    from accelerate import disk_offload as offload

    return passes(offload(classifier(job), job["scratch"]))


def lazy_layers(job):
    """PyTorch with a list of layers: one that is not there is built and loaded from its file; another is deleted."""
    import torch

    torch.set_num_threads(job.get("threads") or 1)
    folder, keep, rule = Path(job["prepared"]), job.get("resident_layers") or 1, job.get("residency") or "fifo"
    model, name, count = _without_layers(job)
    model.load_state_dict(torch.load(folder / "rest.pt", weights_only=True))
    build = _builder(model.config, count, name)

    class LayerList(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = {}

        def __len__(self):
            return count

        def __iter__(self):
            return map(self.layer, range(count))

        def layer(self, index):
            if index not in self.kept:
                while len(self.kept) >= keep:
                    del self.kept[list(self.kept)[-1 if rule == "mru" else 0]]
                self.kept[index] = build(index)
                self.kept[index].load_state_dict(torch.load(folder / f"layer-{index}.pt", weights_only=True))
            elif rule == "lru":
                self.kept[index] = self.kept.pop(index)
            return self.kept[index]

    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, LayerList())
    return passes(model.eval())


def _without_layers(job):
    """Return a classifier that has no layers, the name of their list, and their number."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(job["model"], local_files_only=True)
    count, config.num_hidden_layers = config.num_hidden_layers, 0
    model = AutoModelForSequenceClassification.from_config(config)
    return model, _list_of_layers(model, 0), count


def _list_of_layers(model, count):
    """Return the name of the list of `count` layers. Raises ValueError for a model that has none, or several."""
    import torch

    names = [name for name, each in model.named_modules() if isinstance(each, torch.nn.ModuleList)]
    names = [name for name in names if len(model.get_submodule(name)) == count]
    if len(names) != 1:
        raise ValueError("the model has no single list of layers")
    return names[0]


def _builder(config, count, name):
    """Return a function that builds layer `index` as the model does, with weights drawn at random."""
    import torch
    from transformers import AutoModelForSequenceClassification

    config.num_hidden_layers = 1
    with torch.device("meta"):
        kind = type(AutoModelForSequenceClassification.from_config(config).get_submodule(name)[0])
    config.num_hidden_layers = count
    takes_index = "layer_idx" in inspect.signature(kind).parameters
    return lambda index: kind(config, **({"layer_idx": index} if takes_index else {})).eval()


def memopro(job):
    """memopro: weights are left in the model's files and read within its budget."""
    import torch
    from memopro.rt.torch import stream_model
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.set_num_threads(job["threads"])
    config = AutoConfig.from_pretrained(job["model"], local_files_only=True)
    kind = AutoModelForSequenceClassification._model_mapping[type(config)]
    return passes(stream_model(job["model"], budget=job["budget"], device="cpu", model_class=kind))


def onnxruntime(job):
    """ONNX Runtime with the plain or the quantised export."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job["threads"], 1
    session = ort.InferenceSession(str(Path(job["prepared"]) / ONNX), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(ids_S, types_S):
        given = _named(np, ids_S, types_S)
        return session.run(None, {name: given[name] for name in names})[0][0]

    return run, _same


def _named(np, ids_S, types_S):
    """Return the inputs of an exported model by name, [1, S]."""
    ids_BS = np.array([ids_S], np.int64)
    return {
        "input_ids": ids_BS,
        "attention_mask": np.ones_like(ids_BS),
        "token_type_ids": np.array([types_S], np.int64),
    }


def openvino(job):
    """OpenVINO in the precision that it chooses for this processor: bfloat16 where it has instructions for it."""
    import numpy as np
    from openvino import Core

    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": job["threads"], "NUM_STREAMS": 1}
    core = Core()
    compiled = core.compile_model(core.read_model(str(Path(job["prepared"]) / "model.xml")), "CPU", options)
    job["precision"] = {"f32": "fp32"}.get(compiled.get_property("INFERENCE_PRECISION_HINT").to_string(), "bf16")
    names = [each.get_any_name() for each in compiled.inputs]
    request = compiled.create_infer_request()

    def run(ids_S, types_S):
        given = _named(np, ids_S, types_S)
        return request.infer({name: given[name] for name in names})[0][0].copy()

    return run, _same


def ctranslate2(job):
    """CTranslate2's encoder and pooler in int8; the classifier behind them in NumPy."""
    import ctranslate2 as ct2
    import numpy as np

    options = {"compute_type": "int8", "inter_threads": 1, "intra_threads": job["threads"]}
    encoder = ct2.Encoder(job["prepared"], device="cpu", **options)
    head = {name: np.array(values, np.float32) for name, values in _head(job).items()}

    def run(ids_S, types_S):
        pooled_BH = np.array(encoder.forward_batch([ids_S], token_type_ids=[types_S]).pooler_output)
        return (pooled_BH @ head["classifier.weight"].T + head["classifier.bias"])[0]

    return run, _same


def _head(job):
    return json.loads((Path(job["prepared"]) / HEAD).read_text())


def llama_cpp(job):
    """llama.cpp up to the last hidden state of the first token; pooler and classifier follow after all measurements."""
    import xllamacpp as llama

    params, length = llama.CommonParams(), max(len(ids_S) for ids_S, _ in job["inputs"])
    params.model.path = str(Path(job["prepared"]) / "model.gguf")
    params.embedding, params.embd_normalize, params.warmup, params.verbosity = True, -1, False, 0
    params.pooling_type = llama.llama_pooling_type.LLAMA_POOLING_TYPE_CLS
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.n_parallel, params.fit_params = 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    server = llama.Server(params)

    def run(ids_S, types_S):
        found = server.handle_embeddings({"input": ids_S})
        return found["data"][0]["embedding"]

    return run, lambda hidden_H: _classify(hidden_H, _head(job))


def _classify(hidden_H, head):
    """Return BERT's logits of a hidden state, without NumPy."""
    import math

    def linear(name, values):
        rows = zip(head[name + ".weight"], head[name + ".bias"])
        return [sum(w * x for w, x in zip(row, values)) + bias for row, bias in rows]

    return linear("classifier", [math.tanh(value) for value in linear("bert.pooler.dense", hidden_H)])


RIVALS = {
    "transformers": transformers,
    "transformers-bf16": transformers_bf16,
    "disk": disk,
    "disk-offload": disk_offload,
    "lazy-layers": lazy_layers,
    "memopro": memopro,
    "onnxruntime": onnxruntime,
    "onnxruntime-int8": onnxruntime,
    "openvino": openvino,
    "ctranslate2": ctranslate2,
    "llama.cpp": llama_cpp,
}


# Forms: each converts the model, or the form in `source`, into files in `out`. ---------------------------------------


def to_onnx(job, out):
    """Export by tracing, with both axes free."""
    import torch

    model = classifier(job, attn_implementation="eager").requires_grad_(False)
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in _parameters(model)]

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *given):
            return self.model(**dict(zip(names, given))).logits

    example = tuple(torch.ones(2, 8, dtype=torch.int64) for _ in names)
    options = {"dynamic_axes": {name: {0: "batch", 1: "tokens"} for name in names}, "opset_version": 17}
    target = str(Path(out) / ONNX)
    torch.onnx.export(Logits().eval(), example, target, input_names=names, dynamo=False, **options)


def to_onnx_int8(job, out):
    """Quantise as ONNX Runtime documents for transformers: weights ahead, activations while running."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(Path(job["source"]) / ONNX), str(Path(out) / ONNX), weight_type=QuantType.QInt8)


def to_openvino(job, out):
    """Convert the ONNX export into OpenVINO's own format, float32."""
    import openvino as ov

    ov.save_model(
        ov.convert_model(str(Path(job["source"]) / ONNX)), str(Path(out) / "model.xml"), compress_to_fp16=False
    )


def to_ctranslate2(job, out):
    """Convert encoder and pooler, int8."""
    from ctranslate2.converters import TransformersConverter
    from transformers import BertConfig

    _bert_config(job)
    BertConfig.position_embedding_type = "absolute"  # read by the converter; transformers 5 has no other
    TransformersConverter(job["model"]).convert(out, quantization="int8", force=True)
    _save_head(job, out, "classifier")


def to_gguf(job, out):
    """Convert the encoder as llama.cpp does: tables and matrices in Q8_0, all else in float32."""
    import gguf

    config, writer = _bert_config(job), gguf.GGUFWriter(str(Path(out) / "model.gguf"), "bert")
    _describe(writer, gguf, config, Path(job["model"]))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, array in _tensors(job["model"]):
        known = names.get_name(name[len("bert.") :], try_suffixes=(".weight", ".bias"))
        if known is None or not name.startswith("bert.") or "pooler" in name:
            continue
        is_narrow = array.ndim == 2 and not known.startswith(("position_embd", "token_types"))
        kind = gguf.GGMLQuantizationType.Q8_0 if is_narrow else gguf.GGMLQuantizationType.F32
        writer.add_tensor(known, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _save_head(job, out, "bert.pooler.dense", "classifier")


def to_layers(job, out):
    """Write each layer into a file of its own, and everything else into one."""
    import torch

    model = classifier(job)
    name, files = _list_of_layers(model, model.config.num_hidden_layers), {"rest": {}}
    for key, value in model.state_dict().items():
        index, _, inner = key[len(name) + 1 :].partition(".") if key.startswith(name + ".") else ("", "", "")
        files.setdefault(f"layer-{index}" if index else "rest", {})[inner or key] = value
    for file, tensors in files.items():
        torch.save(tensors, Path(out) / f"{file}.pt")


def _describe(writer, gguf, config, model):
    """Write the facts that llama.cpp wants of a BERT."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.CLS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    words = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    tokens = sorted(words, key=words.get) + ["[unused]"] * (config["vocab_size"] - len(words))
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    for role, token in (("bos", "[CLS]"), ("sep", "[SEP]"), ("unk", "[UNK]"), ("pad", "[PAD]"), ("mask", "[MASK]")):
        getattr(writer, f"add_{role}_token_id")(words[token])


def _bert_config(job):
    """Return the configuration of a BERT. Raises ValueError for another model: its head would be another one."""
    config = json.loads((Path(job["model"]) / "config.json").read_text(encoding="utf-8"))
    if config.get("architectures") != ["BertForSequenceClassification"]:
        raise ValueError("only BertForSequenceClassification is converted for this rival")
    return config


def _tensors(folder):
    """Yield name and array of each float32 tensor in the safetensors files of a folder."""
    import numpy as np

    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, facts in header.items():
            if name != "__metadata__" and facts["dtype"] == "F32":
                shape, offset = tuple(facts["shape"]), 8 + size + facts["data_offsets"][0]
                yield name, np.memmap(path, np.float32, "r", offset, shape)


def _save_head(job, out, *layers):
    found = {name: array.tolist() for name, array in _tensors(job["model"]) if name.rpartition(".")[0] in layers}
    (Path(out) / HEAD).write_text(json.dumps(found))


FORMS = {
    "onnx": to_onnx,
    "onnx-int8": to_onnx_int8,
    "openvino": to_openvino,
    "ctranslate2": to_ctranslate2,
    "gguf": to_gguf,
    "layers": to_layers,
}

if __name__ == "__main__":
    main()
