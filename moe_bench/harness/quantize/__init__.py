"""Post-training quantisation through nvidia-modelopt."""
