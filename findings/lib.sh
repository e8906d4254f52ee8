# Sourced by every finding.

# make_env PACKAGE...: makes a new virtual environment with these packages, first on PATH. It lies in a temporary
# folder, which becomes the working folder and is removed at the end.
make_env() {
    PYTHONPATH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    folder=$(mktemp -d)
    trap 'cd / && rm -rf "$folder"' EXIT
    cd "$folder"
    python3 -m venv venv
    PATH="$folder/venv/bin:$PATH"
    # CPU only, nothing compiled in advance, no model hub, and no output but the finding's own.
    export PATH PYTHONPATH PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
    export DS_ACCELERATOR=cpu DS_BUILD_OPS=0 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
    export TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1
    # One at a time: DeepSpeed's build looks for the torch before it.
    for package in "$@"; do
        python -m pip install -qq "$package"
        echo "$package"
    done
}
