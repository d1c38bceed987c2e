# Shell functions about torch, sourced by the scripts beside this file; run from the repository root.

# torch_build: prints `any` (no constraint: a GPU is here, or the user says so) or `cpu` (the pinned CPU build).
torch_build() {
    case ${FLOWLIK_TORCH:-auto} in
        any | cpu) echo "$FLOWLIK_TORCH" ;;
        auto) if nvidia-smi -L >/dev/null 2>&1; then echo any; else echo cpu; fi ;;
        *) echo "flowlik: FLOWLIK_TORCH is '$FLOWLIK_TORCH', it can be any, cpu or auto" >&2; return 1 ;;
    esac
}

# torch_version PYTHON: prints the version of the torch that PYTHON finds, nothing if there is none or it is too old.
torch_version() {
    "$1" - "$(sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)" <<'PYTHON'
import re, sys
from importlib.metadata import PackageNotFoundError, version
def key(text):
    return [int(number) for number in re.findall("[0-9]+", text.split("+")[0])]
try:
    found = version("torch")
except PackageNotFoundError:
    sys.exit()
if key(found) >= key(sys.argv[1]):
    print(found)
PYTHON
}

# torch_shared PYTHON: prints `true` where environments made from PYTHON should see PYTHON's own torch: any build is
# welcome here, and PYTHON (not itself a virtual environment, whose packages cannot be shared that way) has one.
torch_shared() {
    if [ "$(torch_build)" = any ] && [ -n "$(torch_version "$1")" ] &&
        "$1" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then echo true; else echo false; fi
}
