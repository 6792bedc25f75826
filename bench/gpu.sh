#!/usr/bin/env bash
# From a fresh node to a report that compares split with aggregated serving; bench/gpu.md explains it.
set -euo pipefail

usage() {
  cat <<'TEXT'
bench/gpu.sh [--share | --groups] [--cpu] [--model ID_OR_FOLDER] [--dummy] [--out FOLDER] [-- OPTIONS OF bench compare]

  (nothing)     two GPUs of this node: one reads prompts, one writes answers
  --share       one GPU of this node, which both engines share
  --groups      two groups of nodes of the Ray cluster that this node is in (bench/gpu.md says how to start it)
  --cpu         the same on two cores with the model that ships with Baton
  --model       Hugging Face id or folder; default: that of configs/gpu-node.yaml
  --dummy       random weights: only the model's configuration and tokenizer are needed
  --out         where report.html, report.json and the configuration go; default: gpu-report
TEXT
}
die() { echo "bench/gpu.sh: $*" >&2; exit 2; }
say() { echo "== $*"; }

form=node device=gpu model="" dummy="" out=gpu-report
while (($#)); do
  case $1 in
    --share) form=share ;;
    --groups) form=groups ;;
    --cpu) device=cpu ;;
    --dummy) dummy=--dummy ;;
    --model | --out)
      (($# > 1)) || die "$1 needs a value; see bench/gpu.sh --help"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "there is no option $1; see bench/gpu.sh --help" ;;
  esac
  shift
done
[[ $form/$device != share/cpu ]] || die "--share is for a GPU; two engines that share a core are no measurement"
[[ $device == cpu ]] || command -v nvidia-smi >/dev/null || die "no nvidia-smi here; install NVIDIA's driver, or pass --cpu"
mkdir -p "$out"
out=$(cd "$out" && pwd)
[[ ! -d $model ]] || model=$(cd "$model" && pwd)
cd "$(dirname "$0")/.."

say "installing into .venv"
if [[ $device == cpu ]]; then
  [[ -x .venv/bin/baton ]] || make setup
  base=configs/local.yaml
else
  python=${PYTHON:-python3.11}
  command -v "$python" >/dev/null || die "$python is missing; install Python 3.11 or set PYTHON"
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv
  .venv/bin/python -c "import vllm, plotly, gateway" 2>/dev/null || .venv/bin/pip install --quiet --editable ".[gpu,bench]"
  base=configs/gpu-node.yaml
fi

config=$out/config.yaml
words=()
[[ -z $model ]] || words+=(--model "$model")
[[ -z $dummy ]] || words+=(--dummy)
[[ $form == node ]] || words+=("--$form")
key=$(.venv/bin/python -m bench.recipe "$base" "$config" "${words[@]}")
if [[ $form == groups ]]; then
  export BATON_API_KEY=$key
  systems=(aggregated split)
else
  say "checking this machine"
  .venv/bin/baton doctor "$config"
  systems=(aggregated split bare router)
fi

say "comparing ${systems[*]}"
.venv/bin/python -m bench compare "${systems[@]}" --config "$config" \
  --html "$out/report.html" --json "$out/report.json" "$@"
