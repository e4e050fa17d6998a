"""The DeepSpeed configuration of a run, derived from its settings."""

from typing import Any

from megavlm.config.run import RunSettings


def deepspeed_config(run: RunSettings) -> dict[str, Any]:
    """DeepSpeed's JSON for ZeRO-3; independent of the number of ranks.

    The optimiser and its schedule are ours (`engine/optim.py`), so they are not named here.
    """
    return {
        "train_batch_size": run.train.samples_per_step,
        "gradient_accumulation_steps": run.train.micro_batches,
        "gradient_clipping": run.optimizer.clip_norm,
        "bf16": {"enabled": run.train.precision == "bf16"},
        # Sums over micro-batches lose small gradients in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": run.zero3.reduce_bucket,
            "stage3_prefetch_bucket_size": run.zero3.prefetch_bucket,
            "stage3_param_persistence_threshold": run.zero3.persistence_threshold,
            "stage3_max_live_parameters": run.zero3.max_live_parameters,
            "overlap_comm": run.zero3.overlap_communication,
        },
        "wall_clock_breakdown": False,
        # DeepSpeed's own progress lines repeat what our log says.
        "steps_per_print": 10**9,
    }
