#!/usr/bin/env bash
# Sets up everything that the scripts need: system libraries, a virtual environment in .venv, the
# pinned packages of requirements.lock, and occgen_hub itself (editable).
#
# If nothing changed since the last run, it only checks this, in a fraction of a second.
#   --with-da3                      also install Depth Anything 3, for --engine da3
#   OCCGEN_PYTHON=/path/to/python   use only this Python
#   OCCGEN_TORCH=cpu                PyTorch without CUDA, 4 GB less; OCCGEN_TORCH=cuda undoes this
set -euo pipefail

# uv installs the packages faster than pip does; without it pip installs the same ones.
uv_pin="uv==0.13.9"

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv="$root/.venv"
py="$venv/bin/python"
stamp="$venv/.occgen-setup"                 # digest of the inputs of the finished set-up
unfinished="$venv/.occgen-setup-unfinished" # exists during a set-up; if left over, it was interrupted
torch_note="$venv/.occgen-torch"            # "cpu" if PyTorch was installed without CUDA

with_da3=""
for option in "$@"; do
    case $option in
        --with-da3) with_da3=yes ;;
        *)
            printf 'usage: scripts/setup.sh [--with-da3]\n' >&2
            exit 2
            ;;
    esac
done

say() { printf 'set-up: %s\n' "$*" >&2; }
die() {
    printf 'set-up failed: %s\n' "$*" >&2
    exit 1
}

# Runs a command and shows what it printed only if it fails.
quietly() {
    local output
    output=$("$@" 2>&1) || {
        printf '%s\n' "$output" >&2
        return 1
    }
}

case ${OCCGEN_TORCH:-} in
    "" | cpu | cuda) ;;
    *) die "OCCGEN_TORCH is $OCCGEN_TORCH; set it to cpu or cuda, or unset it." ;;
esac
installed_torch() { cat "$torch_note" 2>/dev/null || printf 'cuda\n'; }
torch=${OCCGEN_TORCH:-$(installed_torch)} # default: unchanged

# No prompts, and no settings of other environments.
exec </dev/null
unset PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIREMENT UV_SYSTEM_PYTHON
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

# --- Python -------------------------------------------------------------------------------------

# Prints "ok 3.12", or why this Python cannot be used. Old Pythons have to be able to parse it.
probe='
import sys
version = "%d.%d" % sys.version_info[:2]
if sys.version_info < (3, 12):
    print("is Python " + version)
elif sys.implementation.name != "cpython":
    print("is " + sys.implementation.name)
else:
    try:
        import bz2, ctypes, ensurepip, lzma, ssl, sysconfig, venv, zlib
        free = sysconfig.get_config_var("Py_GIL_DISABLED")
        print("is the free-threaded build of " + version if free else "ok " + version)
    except ImportError as error:
        print("is Python %s without a required module: %s" % (version, error))
'

# A python command may exist and still fail, such as the pyenv shim of an inactive version. So it has
# to be run.
probe_python() {
    local answer
    answer=$("$1" -I -c "$probe" 2>/dev/null) || answer=""
    printf '%s\n' "${answer:-does not run}"
}

# Prints all paths where a Python may be, one per line, the most likely first.
python_candidates() {
    local version name home="${HOME:-/nonexistent}" folder
    for version in 3.12 3.13; do
        type -aP "python$version" || true
        for folder in "${PYENV_ROOT:-$home/.pyenv}" "$home/.pyenv" /opt/pyenv; do
            printf '%s\n' "$folder/versions/$version/bin/python" "$folder/versions/$version".*/bin/python
        done
        folder="${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$home/.local/share}/uv/python}"
        printf '%s\n' "$folder/cpython-$version".*/bin/python3 "$folder/cpython-$version"-*/bin/python3
        for folder in /usr/local/bin /usr/bin /opt/homebrew/bin "/opt/python/$version/bin"; do
            printf '%s\n' "$folder/python$version"
        done
    done
    for name in python3 python python3.14; do
        type -aP "$name" || true
    done
    printf '%s\n' "${PYENV_ROOT:-$home/.pyenv}"/versions/*/bin/python "$home"/.pyenv/versions/*/bin/python
}

# Sets base_python. Prefers 3.12, then 3.13: the pinned packages have wheels for these two.
find_python() {
    local candidate answer rank best=9 seen=$'\n' looked=""
    base_python=""
    if [ -n "${OCCGEN_PYTHON:-}" ]; then
        base_python=$(type -P "$OCCGEN_PYTHON" || true)
        answer=$(probe_python "${base_python:-$OCCGEN_PYTHON}")
        case $answer in
            "ok "*) return ;;
            *) die "OCCGEN_PYTHON is $OCCGEN_PYTHON, which $answer; set it to a Python 3.12 or 3.13, or unset it." ;;
        esac
    fi
    while IFS= read -r candidate; do
        if [ ! -f "$candidate" ] || [ ! -x "$candidate" ]; then continue; fi
        case $seen in *$'\n'"$candidate"$'\n'*) continue ;; esac
        seen+="$candidate"$'\n'
        answer=$(probe_python "$candidate")
        case $answer in
            "ok 3.12") rank=0 ;;
            "ok 3.13") rank=1 ;;
            "ok "*) rank=2 ;;
            *) rank=9 ;;
        esac
        looked+="  $candidate $answer"$'\n'
        if [ "$rank" -lt "$best" ]; then
            best=$rank
            base_python=$candidate
        fi
        [ "$best" -gt 0 ] || break
    done < <(python_candidates 2>/dev/null)
    [ "$best" != 2 ] ||
        say "only a Python newer than 3.13 was found; the pinned packages may have no wheels for it."
    [ -z "$base_python" ] || return 0
    say "these Pythons were found, including the folders of pyenv and uv:"
    printf '%s' "${looked:-"  (none)"$'\n'}" >&2
    die "no working Python 3.12 or newer was found; install one with 'uv python install 3.12', 'pyenv install 3.12' or 'apt-get install python3.12 python3.12-venv', or set OCCGEN_PYTHON to one, and run this again."
}

# --- System libraries ---------------------------------------------------------------------------

# Prints the Debian packages of the libraries that cannot be loaded. Open3D links to all of them, and
# its wheel includes none of them.
missing_libraries='
import ctypes, sys
libraries = (
    ("libusb-1.0.so.0", "libusb-1.0-0"),
    ("libGL.so.1", "libgl1"),
    ("libEGL.so.1", "libegl1"),
    ("libgomp.so.1", "libgomp1"),
    ("libX11.so.6", "libx11-6"),
    ("libudev.so.1", "libudev1"),
    ("libidn2.so.0", "libidn2-0"),
    ("libstdc++.so.6", "libstdc++6"),
)
if sys.platform == "linux":
    for library, package in libraries:
        try:
            ctypes.CDLL(library)
        except OSError:
            print(package)
'

ensure_libraries() { # $1: the Python for the check
    local packages command
    packages=$("$1" -I -c "$missing_libraries" | tr '\n' ' ')
    packages=${packages% }
    [ -n "$packages" ] || return 0
    command="apt-get install -y --no-install-recommends $packages"
    if [ "$(id -u)" = 0 ] && type -P apt-get >/dev/null; then
        say "installing the system libraries that Open3D and video need: $packages"
        export DEBIAN_FRONTEND=noninteractive
        quietly apt-get update ||
            say "apt-get update failed; trying with the existing package lists."
        # shellcheck disable=SC2086  # a list of package names
        quietly apt-get install -y --no-install-recommends $packages ||
            die "the system libraries could not be installed; run '$command', then run this again."
        packages=$("$1" -I -c "$missing_libraries" | tr '\n' ' ')
        [ -z "$packages" ] ||
            die "these packages are installed but their libraries cannot be loaded: ${packages% }; check LD_LIBRARY_PATH and 'ldconfig -p'."
        return 0
    fi
    say "system libraries are missing (Debian packages: $packages)."
    say "On Fedora: dnf install libusb1 libglvnd-glx libglvnd-egl libgomp libX11 libidn2; on Arch: pacman -S libusb libglvnd gcc-libs libx11 libidn2."
    die "run 'sudo apt-get update && sudo $command' (or the equivalent for your system), then run this again."
}

# --- The environment ----------------------------------------------------------------------------

# Prints a digest of the environment's inputs. If it differs from the stamp, .venv is out of date.
key='
import hashlib, pathlib, platform, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256()
for part in (sys.version, platform.machine(), str(root)):
    digest.update(part.encode() + b"\0")
for name in ("requirements.lock", "pyproject.toml", "setup.py"):
    digest.update((root / name).read_bytes() + b"\0")
print(digest.hexdigest())
'

minor_version() { "$1" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# Whether .venv is complete, or made by hand, and has a suitable Python.
usable() {
    [ -f "$venv/pyvenv.cfg" ] && [ ! -e "$unfinished" ] || return 1
    case $(probe_python "$py") in "ok "*) ;; *) return 1 ;; esac
    [ -z "${OCCGEN_PYTHON:-}" ] || [ "$(minor_version "$py")" = "$(minor_version "$OCCGEN_PYTHON")" ]
}

up_to_date() {
    [ -f "$stamp" ] && [ ! -e "$unfinished" ] || return 1
    [ "$("$py" -I -c "$key" "$root" 2>/dev/null)" = "$(cat "$stamp")" ] || return 1
    [ "$torch" = "$(installed_torch)" ] || return 1
    [ -z "${OCCGEN_PYTHON:-}" ] || [ "$(minor_version "$py")" = "$(minor_version "$OCCGEN_PYTHON")" ]
}

# Prints an installer's output without its lines about single packages.
shorten() {
    local line
    while IFS= read -r line || [ -n "$line" ]; do
        case $line in
            " + "* | " - "* | " ~ "* | " Downloaded "*) ;; # uv's
            "Looking in "* | "Requirement already"* | "Collecting "* | "Ignoring "*) ;; # pip's
            "  Obtaining "* | "  Using cached "* | "  Downloading "*" kB)") ;;
            "Installing collected "* | "Successfully "*) ;;
            *) printf '  %s\n' "$line" >&2 ;;
        esac
    done
}

with_uv() { "$py" -m uv pip install --python "$py" "$@" 2>&1 | shorten; }
with_pip() { "$py" -m pip install --progress-bar off "$@" 2>&1 | shorten; }

# uv warns if it cannot make hard links, so it has to copy across file systems.
link_mode() {
    [ -z "${UV_LINK_MODE:-}" ] || return 0
    local cache
    cache=$("$py" -m uv cache dir 2>/dev/null) || return 0
    mkdir -p "$cache" 2>/dev/null || return 0
    "$py" -I -c 'import os, sys; sys.exit(os.stat(sys.argv[1]).st_dev != os.stat(sys.argv[2]).st_dev)' \
        "$cache" "$venv" || export UV_LINK_MODE=copy
}

# uv knows PyTorch's own index of CPU builds. Other indexes may have them as versions like 2.11.0+cpu.
install_cpu_pins() {
    local pins="$venv/.requirements-cpu"
    grep -v -E '^(nvidia-|cuda-|triton==)' requirements.lock >"$pins"
    local how=(--no-deps --only-binary ":all:" -r "$pins")
    "$py" -m pip install --quiet "$uv_pin" >/dev/null 2>&1 && link_mode &&
        with_uv --compile-bytecode --torch-backend cpu "${how[@]}" && return
    say "PyTorch's own index could not be used; trying versions that end in +cpu on your index."
    grep -v -E '^(nvidia-|cuda-|triton==)' requirements.lock |
        sed -E 's/^(torch|torchvision)==([^ +]+)/\1==\2+cpu/' >"$pins"
    # Asks for PyTorch first, because pip would load many other packages before it finds out.
    "$py" -m pip install --quiet --dry-run --no-deps --only-binary ":all:" \
        "$(grep -o -E '^torch==[^ ;]+' "$pins")" >/dev/null 2>&1 && with_pip "${how[@]}"
}

install_pins() {
    if [ "$torch" = cpu ]; then
        install_cpu_pins && return
        die "no CPU build of the pinned PyTorch could be downloaded; run this again without OCCGEN_TORCH=cpu for the default build, which also runs without a GPU."
    fi
    # Wheels only: if this Python has none, it fails at once and not after a long compilation.
    local how=(--no-deps --only-binary ":all:" -r requirements.lock)
    if "$py" -m pip install --quiet "$uv_pin" >/dev/null 2>&1; then
        link_mode
        # First with the system's certificates, which company networks may need, then with uv's.
        UV_SYSTEM_CERTS=true with_uv --compile-bytecode "${how[@]}" && return
        with_uv --compile-bytecode "${how[@]}" && return
        say "uv could not install the packages; trying with pip."
    else
        say "uv could not be installed; using pip, which is slower."
    fi
    with_pip "${how[@]}"
}

# Uses the pinned setuptools, so that nothing unpinned is involved.
install_project() {
    "$py" -m pip install --quiet --no-deps --no-build-isolation --editable . >&2
}

# Pinned by hash and without its dependencies: it requires an older numpy, and packages for its own
# tools.
install_da3() {
    "$py" -I -c "$has_da3" && return 0
    say "installing Depth Anything 3."
    "$py" -m pip install --quiet --no-deps --no-build-isolation --require-hashes \
        -r requirements-da3.lock >&2 ||
        die "Depth Anything 3 could not be installed; check the network and run this again."
}

# Whether the packages of requirements-da3.lock are installed in the pinned versions.
has_da3='
import sys
from importlib.metadata import PackageNotFoundError, version
lines = [line.split() for line in open("requirements-da3.lock") if "==" in line]
try:
    sys.exit(any(version(name) != pin for name, pin in (line[0].split("==") for line in lines)))
except PackageNotFoundError:
    sys.exit(1)
'

# Without an NVIDIA driver, explains how to install without CUDA.
say_what_cuda_takes() {
    if [ "$torch" = cpu ] || [ "$interrupted" = cpu ] || [ "$(uname -s)" != Linux ] || type -P nvidia-smi >/dev/null || [ -e /proc/driver/nvidia ]; then
        return 0
    fi
    say "this machine has no NVIDIA GPU, but 4 GB will be installed for CUDA."
    say "Where PyTorch's own index can be reached, you can avoid this: press Ctrl-C and put OCCGEN_TORCH=cpu before the same command."
}

make_environment() {
    local begun=$SECONDS interrupted=
    [ ! -f "$unfinished" ] || interrupted=$(cat "$unfinished") # the PyTorch of that set-up
    if usable && [ "$torch" = "$(installed_torch)" ]; then
        say "bringing .venv (Python $(minor_version "$py")) up to date with requirements.lock."
        printf %s "$torch" >"$unfinished"
        rm -f "$stamp"
        "$py" -I -c 'import pip' 2>/dev/null || "$py" -m ensurepip >/dev/null # uv environments have no pip
    else
        find_python
        ensure_libraries "$base_python"
        [ ! -e "$unfinished" ] || say "an earlier set-up was interrupted; starting again."
        say "making .venv with $base_python (Python $(minor_version "$base_python"))."
        mkdir -p "$venv"
        printf %s "$torch" >"$unfinished"
        find "$venv/" -mindepth 1 -maxdepth 1 ! -name "${unfinished##*/}" -exec rm -rf {} +
        "$base_python" -m venv "$venv" >&2 ||
            die "$base_python could not create a virtual environment; set OCCGEN_PYTHON to another Python."
    fi
    ensure_libraries "$py"
    say_what_cuda_takes
    say "installing the pinned packages (the first time: downloads up to $([ "$torch" = cpu ] && echo 1 || echo 3) GB, some minutes)."
    install_pins ||
        die "the packages of requirements.lock could not be installed with Python $(minor_version "$py"); check the network, the free disk space (12 GB) and that this is Python 3.12 or 3.13, then run this again."
    install_project ||
        die "occgen_hub itself could not be installed from $root; see the lines above."
    # Depth Anything 3 is installed without its dependencies, so pip's complaints are ignored.
    "$py" -m pip check 2>&1 | { ! grep -v -e '^depth-anything-3 ' -e '^No broken requirements'; } >&2 ||
        say "requirements.lock does not match pyproject.toml, see above; docs/development.md explains how to update it."
    "$py" -c 'from occgen_hub.occupancy.visibility import warm_up; warm_up()' >/dev/null 2>&1 ||
        say "the kernels could not be compiled now; they will be compiled at their first use."
    printf '%s\n' "$torch" >"$torch_note"
    "$py" -I -c "$key" "$root" >"$stamp"
    rm -f "$unfinished"
    say "done in $((SECONDS - begun)) s."
}

cd -- "$root"
if [ ! -f requirements.lock ] || [ ! -f pyproject.toml ] || [ ! -f setup.py ]; then
    die "requirements.lock, pyproject.toml or setup.py is missing from $root; get a complete clone."
fi
# A second run waits for the first one, since both write to .venv.
if type -P flock >/dev/null; then
    exec 9<requirements.lock
    flock --nonblock 9 2>/dev/null || {
        say "another set-up is running here; waiting for it."
        flock 9 || true
    }
fi
if up_to_date; then
    ensure_libraries "$py"
else
    make_environment
fi
if [ -n "$with_da3" ]; then install_da3; fi
