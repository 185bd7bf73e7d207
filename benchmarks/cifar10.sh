#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The papers' claims at the size of a CPU: small models on CIFAR-10 at 32 x 32, patch 4, equal budgets, one thread each.
#   [SEED=0] benchmarks/cifar10.sh DATA OUT STAGE...
# Stages: denoisers pretrain reconstruct certified sigma probe nim adversarial measure autoattack.
# DATA is a CIFAR-10 folder, torchvision's or parquet. Stages may run side by side; a stage that is called again goes on
# where it stopped. Another seed needs another OUT. docs/cifar10.md holds what came out.
set -euo pipefail
data=cifar10:$(cd "$1" && pwd) out=$2
shift 2
mkdir -p "$out"
export OMP_NUM_THREADS=1
common=(--data "$data" --model nano --threads 1 --precision fp32 --crop none --flip --save-every 1 --keep 1 --resume --seed "${SEED:-0}")
plain=(--rand-augment none --mixup 0 --cutmix 0 --label-smoothing 0) # five epochs are too few for more

train() { # script recipe name options...
  [ -f "$out/$3.safetensors" ] || python -m "train.$1" "$2" "${common[@]}" --out "$out/$3.safetensors" "${@:4}"
}
pretrain() { train pretrain "$1" "$2" --batch-size 128 --lr 2e-3 --validate-every 1 "${@:3}"; }
finetune() {
  train finetune "$1" "$2" --batch-size 128 --epochs 5 --lr 4e-3 --warmup 0.5 --layer-decay 0.9 --drop-path 0 \
    --validate-every 5 --validation-votes 10 "${@:3}"
}

for stage in "$@"; do
  case $stage in
  denoisers)
    pretrain nim-mae nim-random --epochs 2 --warmup 0.3
    pretrain nim-mae nim-fixed --epochs 2 --warmup 0.3 --sigma 75/255
    ;;
  pretrain)
    pretrain dmae dmae --epochs 10 --warmup 1
    pretrain mae mae --epochs 10 --warmup 1
    ;;
  reconstruct)
    for model in nim-random nim-fixed dmae; do
      python -m nimfast.reconstruct --model "$out/$model.safetensors" --data "$data" --limit 300 --sigma 70/255 \
        --out "$out/$model-pictures"
    done
    ;;
  certified)
    for from in dmae mae; do
      for loss in cr rs; do
        finetune $loss-cifar10 $from-$loss-0.25 --sigma 0.25 --init "$out/$from.safetensors"
      done
    done
    ;;
  sigma)
    finetune cr-cifar10 dmae-cr-random --sigma 'uniform(0,0.75)' --init "$out/dmae.safetensors"
    for sigma in 0.50 0.75; do
      finetune cr-cifar10 dmae-cr-$sigma --sigma $sigma --init "$out/dmae.safetensors"
    done
    ;;
  probe)
    for from in dmae mae; do
      train linprobe noisy $from-probe-0.25 --sigma 0.25 --init "$out/$from.safetensors" --batch-size 1024 --epochs 4 \
        --lr 0.4 --warmup 0.5 --validate-every 4 --validation-votes 10
    done
    ;;
  nim)
    finetune clean nim-clean --init "$out/nim-random.safetensors" "${plain[@]}"
    finetune denoised nim-denoised --init "$out/nim-random.safetensors" "${plain[@]}"
    ;;
  adversarial) # two epochs of the recipe's PGD-5
    adversarial=(--batch-size 128 --epochs 2 --optimizer adamw --lr 4e-3 --lr-batch 256 --schedule cosine --warmup 0.2
      --layer-decay 0.9 --weight-decay 0.05 --mixup 0 --cutmix 0)
    train adversarial pgd adversarial-nim "${adversarial[@]}" --init "$out/nim-random.safetensors"
    train adversarial pgd adversarial-scratch "${adversarial[@]}"
    ;;
  measure)
    for model in "$out"/*-{cr,rs,probe}-{0.25,0.50,0.75,random}.safetensors; do
      [ -f "$model" ] || continue
      name=$(basename "$model" .safetensors)
      sigmas=${name##*-}
      [ "$sigmas" = random ] && sigmas="0.25 0.50 0.75"
      for sigma in $sigmas; do
        radii=(0 0.25 0.5 0.75)
        [ "$sigma" = 0.25 ] || radii+=(1 1.5) # more than sigma 0.25 can certify
        python -m nimfast.certify --data "$data" --model "$model" --sigma "$sigma" --every 20 --seed 0 --precision bf16 \
          --radii "${radii[@]}" --out "$out/$name-at-$sigma.tsv"
      done
    done
    attack=(--data "$data" --n-images 200 --seed 0 --attacks none fgsm pgd-10)
    python -m nimfast.attack "${attack[@]}" --model "$out/nim-clean.safetensors" --de3-sigma 0 --out "$out/undefended"
    for model in "$out"/adversarial-*.safetensors; do
      [[ -f $model && $model != *-best.* && $model != *-step* ]] || continue
      python -m nimfast.attack "${attack[@]}" --model "$model" --de3-sigma 0 --out "${model%.safetensors}-attacked"
    done
    python -m nimfast.attack "${attack[@]}" --model "$out/nim-denoised.safetensors" --defense "$out/nim-random.safetensors" \
      --de3-sigma 0 35 70 105 140 --eot 10 --no-cross-checks --out "$out/de3"
    ;;
  autoattack)
    attack=(--data "$data" --n-images 50 --seed 0 --attacks none pgd-10 aa-rand)
    de3=(--model "$out/nim-denoised.safetensors" --defense "$out/nim-random.safetensors" --de3-sigma 0 70)
    python -m nimfast.attack "${attack[@]}" --model "$out/nim-clean.safetensors" --de3-sigma 0 --out "$out/undefended-aa"
    python -m nimfast.attack "${attack[@]}" "${de3[@]}" --protocol nim --no-cross-checks --out "$out/de3-aa-nim"
    python -m nimfast.attack "${attack[@]}" "${de3[@]}" --out "$out/de3-aa-fair"
    ;;
  *)
    echo "no stage $stage" >&2
    exit 2
    ;;
  esac
done
