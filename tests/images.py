"""What Colab's and Kaggle's images ship, as far as the kit meets it: the versions that the set-up cell leaves alone."""

# Colab's GPU image of 2026-08-19 (github.com/googlecolab/backend-info, pip-freeze.gpu.txt): Python 3.13.15.
COLAB = {
    "torch": "2.11.0+cu128", "transformers": "5.15.0", "accelerate": "1.14.0", "peft": "0.20.0", "numpy": "2.1.3",
    "huggingface_hub": "1.27.0", "safetensors": "0.8.0", "tokenizers": "0.22.2", "torchao": "0.10.0",
    "ipywidgets": "7.7.1", "ipykernel": "6.17.1", "ipython": "7.34.0", "plotly": "5.24.1", "anywidget": "0.9.21",
    "psutil": "5.9.5", "tqdm": "4.67.3", "pydantic": "2.13.4", "pyyaml": "6.0.3", "requests": "2.32.4",
    "packaging": "26.3", "markdown-it-py": "4.2.0",
}  # fmt: skip
# Kaggle's of 2026-08-12 (github.com/Kaggle/docker-python) is Colab's of 2026-05-14 with other widgets; Python 3.12.13.
KAGGLE = COLAB | {
    "torch": "2.10.0+cu128", "transformers": "5.0.0", "accelerate": "1.13.0", "peft": "0.19.1", "numpy": "2.0.2",
    "huggingface_hub": "1.11.0", "safetensors": "0.7.0", "ipywidgets": "8.1.5", "pydantic": "2.12.3",
    "packaging": "26.1", "markdown-it-py": "4.0.0",
}  # fmt: skip
PYTHON = {"colab": "3.13.15", "kaggle": "3.12.13"}
PINS = {"colab": COLAB, "kaggle": KAGGLE}
