# Sourced by the other scripts: `environment FOLDER EXTRAS` makes a virtual environment with Pangu in it, once.
# PYTHON chooses the interpreter (3.10 or newer).

environment() {
    local folder=$1 extras=$2 python=${PYTHON:-python3} wanted
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "Python 3.10 or newer is needed, $python is $("$python" --version); set PYTHON" >&2
        exit 2
    }
    wanted="$("$python" --version) $extras $(cksum < pyproject.toml)"
    if [ "$(cat "$folder/installed" 2>/dev/null)" != "$wanted" ]; then
        echo "Setting up $folder (a few minutes, once)"
        rm -rf "$folder"
        "$python" -m venv "$folder"
        "$folder/bin/pip" install --quiet --upgrade pip setuptools
        "$folder/bin/pip" install --quiet --editable ".$extras"
        echo "$wanted" > "$folder/installed"
    fi
    PATH="$PWD/$folder/bin:$PATH"
}
