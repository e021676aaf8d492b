"""Does the memory of a forward and backward pass grow with the vocabulary?

    python experiments/throughput/vocabulary.py

A Llama of two layers and random weights, 8 pairs of 64 prompt and twice 128 completion tokens, on a CPU. Each row is a
process of its own; the number is its peak beyond weights and gradients, which grow with any vocabulary.
"""

import argparse
import subprocess
import sys

WAYS = ("shared", "separate")


def peak_mb(vocabulary: int, way: str) -> float:
    """Peak resident memory of one pass beyond what was resident before it, in MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from xpo.models.forward import Forward

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.fill_(0.0)  # touched, so that it is resident
    forward = Forward(model, way, 400)  # type: ignore[arg-type]
    batch = {
        "prompt_ids": torch.randint(vocabulary, (8, 64)),
        "prompt_mask": torch.ones(8, 64, dtype=torch.bool),
        "completion_ids": torch.randint(vocabulary, (2, 8, 128)),
        "completion_mask": torch.ones(2, 8, 128, dtype=torch.bool),
    }
    before = _status("VmRSS")
    _reset_peak()
    forward(model, batch).sum().backward()
    return (_status("VmHWM") - before) / 1e3


def _status(field: str) -> int:
    """A field of /proc/self/status in kB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 64_000, 128_000, 256_000])
    parser.add_argument("--one", nargs=2, metavar=("VOCABULARY", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(peak_mb(int(options.one[0]), options.one[1]))
        return
    print("| vocabulary | shared, MB | separate, MB |\n| ---: | ---: | ---: |")
    for vocabulary in options.vocabularies:
        peaks = []
        for way in WAYS:
            command = [sys.executable, __file__, "--one", str(vocabulary), way]
            peaks.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"| {vocabulary:,} | {peaks[0]:.0f} | {peaks[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
