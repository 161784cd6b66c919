"""The keys that DeepSpeed 0.19 reads: it passes over most others in silence, a misspelt one included."""

from __future__ import annotations

from typing import Any

from qa_deepspeed.config.options import nearest

TOP_LEVEL = ""

SECTIONS = {
    TOP_LEVEL: """
        activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger
        communication_data_type compile csv_monitor data_efficiency data_types dataloader_drop_last
        disable_allgather disable_python_gc dump_state eigenvalue expert_parallel flops_profiler fp16
        gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
        hybrid_engine log_level memory_breakdown optimizer pipeline prescale_gradients scheduler
        seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers torch_autocast
        train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
        use_node_local_storage vocabulary_size wall_clock_breakdown wandb weight_quantization
        zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """,
    "zero_optimization": """
        allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload cpu_offload_param
        cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks ignore_unused_parameters leaf_module
        legacy_stage1 load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear offload_optimizer
        offload_param overlap_comm override_module_apply parameter_alignment pipeline_loading_checkpoint
        reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage
        stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
        stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
        stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
        stage3_use_all_reduce_for_fetch_params sub_group_size use_multi_rank_bucket_allreduce zenflow
        zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
    """,
    "zero_optimization.offload_param": "buffer_count buffer_size device max_in_cpu nvme_path pin_memory",
    "zero_optimization.offload_optimizer": """
        buffer_count cpuadam_cores_perc device fast_init nvme_path pin_memory pipeline_read pipeline_write ratio
        super_offload
    """,
    "fp16": """
        auto_cast consecutive_hysteresis enabled fp16_master_weights_and_grads hysteresis initial_scale_power loss_scale
        loss_scale_window min_loss_scale
    """,
    "bf16": "bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled immediate_grad_update",
}


def unknown_keys(config: dict[str, Any]) -> list[str]:
    """One phrase for each key that DeepSpeed does not know, with the nearest one it does."""
    phrases = []
    for section, keys in SECTIONS.items():
        settings: Any = config
        for name in section.split("."):
            settings = settings.get(name) if name and isinstance(settings, dict) else settings
        known = keys.split()
        prefix = f"{section}." if section else ""
        if isinstance(settings, dict):
            phrases += [f"'{prefix}{key}'{nearest(key, known)}" for key in settings if key not in known]
    return phrases
