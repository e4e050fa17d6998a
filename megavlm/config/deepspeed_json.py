"""The DeepSpeed configuration of a run, derived from its settings."""

from typing import Any

from megavlm.config.run import RunSettings


def deepspeed_config(run: RunSettings) -> dict[str, Any]:
    """DeepSpeed's JSON for ZeRO-3; independent of the number of ranks.

    The sizes in `run.zero3` must have been chosen (see `planner/zero3.py`). The optimiser and its
    schedule are ours (see `engine/zero3.py`), so they are not named here.
    """
    zero3 = run.zero3
    sizes = {
        "reduce_bucket_size": zero3.reduce_bucket,
        "stage3_prefetch_bucket_size": zero3.prefetch_bucket,
        "stage3_param_persistence_threshold": zero3.persistence_threshold,
        "stage3_max_live_parameters": zero3.max_live_parameters,
        # Weights that return within this distance stay: a recomputed layer's, for its backward.
        "stage3_max_reuse_distance": zero3.max_live_parameters,
    }
    assert None not in sizes.values(), "the bucket sizes must be chosen first"
    folder = {"nvme_path": str(zero3.nvme_folder)} if zero3.nvme_folder is not None else {}
    train = run.train
    batch = {"train_batch_size": train.samples_per_step}
    if train.micro_batch_samples is not None:  # DeepSpeed knows no shares that differ
        batch = {"train_micro_batch_size_per_gpu": train.micro_batch_samples}
    config: dict[str, Any] = {
        **batch,
        "gradient_accumulation_steps": train.micro_batches,
        "gradient_clipping": run.optimizer.clip_norm,
        "bf16": {"enabled": train.precision == "bf16"},
        # Sums over micro-batches lose small gradients in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            **sizes,
            "overlap_comm": zero3.overlap_communication,
            # megatron-core's layers already save memory in this way, and it is a global patch.
            "memory_efficient_linear": False,
            "zero_hpz_partition_size": zero3.secondary_partition,
            "zero_quantized_weights": zero3.quantized_weights,
            "zero_quantized_gradients": zero3.quantized_gradients,
            "offload_optimizer": {"device": zero3.offload_optimizer, **folder},
            "offload_param": {"device": zero3.offload_parameters},
        },
        # The choice of optimiser is the engine's.
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        # DeepSpeed's own progress lines repeat what our log says.
        "steps_per_print": 10**9,
    }
    if zero3.quantized_gradients:
        # Its kernels read 16-bit floats as fp16, whatever they are.
        config["communication_data_type"] = "fp16"
    return config
