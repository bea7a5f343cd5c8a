"""Of which tests `make test` runs only some cases; `make exhaustive` runs the others.

Of a test with the number k, the quick tier runs the first case and every k-th after it, in the
order of the parameters, and none with the number 0. Tests that are not named here run whole, except
for the cases that are marked `exhaustive` where they are written.
"""

TRAINING = "tools/test_training.py::test_statistics_of"

EVERY = {
    "lab/test_checkpoints.py::test_a_position_is_restored_whole_on_other_devices": 2,
    "lab/test_checkpoints.py::test_variables_move_between_device_counts": 2,
    "lab/test_models.py::test_a_residual_mlp_is_as_defined": 2,
    "lab/test_models.py::test_a_norm_without_state_takes_neither_mode_nor_mask": 2,
    "lab/test_models.py::test_an_imagenet_network_is_version_one_and_a_half": 2,
    "lab/test_models.py::test_blocks_are_as_defined": 3,
    "lab/test_models.py::test_evaluation_treats_each_example_alone": 2,
    "lab/test_models.py::test_logits_and_collections": 2,
    "lab/test_models.py::test_masked_examples_change_nothing_for_the_others": 2,
    "lab/test_models.py::test_training_moves_the_scalars": 2,
    "lab/test_processes.py::test_a_run_resumes_after_the_loss_of_process_1": 0,
    "tools/test_audit.py::test_what_is_around_a_norm": 3,
    "tools/test_convert.py::test_larger_resnets_have_every_key_of_torchvision": 3,
    "tools/test_convert.py::test_nnx": 3,
    "tools/test_convert.py::test_resnets_of_torchvision": 2,
    "tools/test_fold.py::test_absorbing_keeps_the_function": 2,
    "tools/test_fold.py::test_absorbing_under_transformations": 3,
    "tools/test_fold.py::test_every_norm_of_our_models_that_follows_a_convolution_is_folded": 3,
    "tools/test_fold.py::test_folded_models_compute_the_same": 3,
    "tools/test_recalibrate.py::test_batches_far_from_zero": 2,
    "tools/test_recalibrate.py::test_every_norm_mixes_its_input_after_norms_that_mix": 3,
    "tools/test_recalibrate.py::test_the_statistics_of_the_whole_data_set_for_any_split": 3,
    "tools/test_remat.py::test_no_number_changes": 3,
    "tools/test_remat.py::test_no_number_changes_whatever_is_kept": 3,
    "tools/test_training.py::test_accumulating_needs_the_memory_of_a_micro_batch": 2,
    f"{TRAINING}_micro_batches_make_the_step_of_virtual_batches": 3,
    f"{TRAINING}_the_whole_batch_make_the_step_of_the_whole_batch": 4,
}
