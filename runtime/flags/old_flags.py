"""Flags of OpenChatKit's training scripts that are none of ours: which are let pass, which are refused and why."""

INERT = (
    "--cuda-num", "--debug-mem", "--train-warmup-steps", "--job-id", "--num-iters", "--train-data", "--valid-data",
    "--tokenizer-type", "--vocab-file", "--vocab-extra-ids", "--make-vocab-size-divisible-by", "--trace-postfix",
    "--event-host", "--event-auth-token", "--aws-endpoint-url", "--aws-access-key-id", "--aws-secret-access-key",
    "--aws-session-token", "--aws-region",
)  # fmt: skip
"""Flags that mean nothing here; most of them were never read there either."""

_START_FROM = "give the folder of that checkpoint as --model-name, and another --checkpoint-path"
REFUSED = {
    "--checkpoint-upload-prefix": "checkpoints are not uploaded: leave it out, and copy those of --checkpoint-path",
    "--checkpoint-load-path": _START_FROM,
    "--load-checkpoint-path": _START_FROM,
    "--init-steps": "a run that starts from another one's weights counts its steps from 0: leave it out",
    "--lora-r": "all weights are trained, there is no LoRA: leave it out",
    "--lora-alpha": "all weights are trained, there is no LoRA: leave it out",
    "--total-scheduler-steps": "the learning rate falls over the whole run: leave it out",
}
"""Flags without which the run would be another one than was meant, and what to do instead."""

INSTEAD = (("total_steps", "nepochs"), ("checkpoint_steps", "num_checkpoints"))
"""Of each pair the first one counts, where both are given: so it was in OpenChatKit."""
