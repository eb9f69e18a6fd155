/* abi.c: sizes, offsets and numbers that compiled programs have built in, for 64-bit Linux (x86-64 and arm64 alike).
 *
 * A line that fails names what moved.  If a field was appended behind all others: change the size here, raise
 * FMOE_VERSION_MINOR, and write an `abi:` line in the changelog.  Anything else breaks programs that exist: raise
 * FMOE_VERSION_MAJOR, libfastermoe.so.N and the version tag FASTERMOE_N together, or better, put it back. */
#include <stddef.h>

#include "check.h"

#define MOVED "an ABI number moved: see the head of abi.c for what to raise"
#define SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), "sizeof " #type ": " MOVED);
#define AT(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field ": " MOVED);
#define NUMBER(name, value) _Static_assert((name) == (value), #name ": " MOVED);

SIZE(void *, 8)
SIZE(fmoe_status, 4)

SIZE(fmoe_message, 24)
AT(fmoe_message, peer, 0) AT(fmoe_message, receiving, 4) AT(fmoe_message, bytes, 8) AT(fmoe_message, size, 16)

SIZE(fmoe_transport, 56)
AT(fmoe_transport, struct_size, 0) AT(fmoe_transport, rank, 4) AT(fmoe_transport, size, 8)
AT(fmoe_transport, reserved, 12) AT(fmoe_transport, context, 16) AT(fmoe_transport, start, 24)
AT(fmoe_transport, test, 32) AT(fmoe_transport, release, 40) AT(fmoe_transport, message_bytes, 48)

SIZE(fmoe_group_options, 40)
AT(fmoe_group_options, struct_size, 0) AT(fmoe_group_options, threads, 4) AT(fmoe_group_options, bind, 8)
AT(fmoe_group_options, reserved, 12) AT(fmoe_group_options, timeout_seconds, 16) AT(fmoe_group_options, topology, 24)
AT(fmoe_group_options, profile, 32)

SIZE(fmoe_layer_options, 104)
AT(fmoe_layer_options, struct_size, 0) AT(fmoe_layer_options, top_k, 4) AT(fmoe_layer_options, d_model, 8)
AT(fmoe_layer_options, d_hidden, 16) AT(fmoe_layer_options, experts, 24) AT(fmoe_layer_options, activation, 32)
AT(fmoe_layer_options, gate, 36) AT(fmoe_layer_options, seed, 40) AT(fmoe_layer_options, capacity_factor, 48)
AT(fmoe_layer_options, balance_loss, 56) AT(fmoe_layer_options, z_loss, 64) AT(fmoe_layer_options, remote_share, 72)
AT(fmoe_layer_options, drop, 80) AT(fmoe_layer_options, reserved, 84) AT(fmoe_layer_options, input_jitter, 88)
AT(fmoe_layer_options, bias_step, 96)

SIZE(fmoe_tensors, 80)
AT(fmoe_tensors, struct_size, 0) AT(fmoe_tensors, local_experts, 4) AT(fmoe_tensors, first_expert, 8)
AT(fmoe_tensors, gate, 16) AT(fmoe_tensors, w1, 24) AT(fmoe_tensors, b1, 32) AT(fmoe_tensors, w2, 40)
AT(fmoe_tensors, b2, 48) AT(fmoe_tensors, w3, 56) AT(fmoe_tensors, noise, 64)
AT(fmoe_tensors, gate_bias, 72)

SIZE(fmoe_adamw_options, 64)
AT(fmoe_adamw_options, struct_size, 0) AT(fmoe_adamw_options, zero_gradients, 4) AT(fmoe_adamw_options, learning_rate, 8)
AT(fmoe_adamw_options, beta1, 16) AT(fmoe_adamw_options, beta2, 24) AT(fmoe_adamw_options, epsilon, 32)
AT(fmoe_adamw_options, weight_decay, 40) AT(fmoe_adamw_options, gradient_scale, 48)
AT(fmoe_adamw_options, decay_biases, 56) AT(fmoe_adamw_options, reserved, 60)

SIZE(fmoe_routing, 72)
AT(fmoe_routing, struct_size, 0) AT(fmoe_routing, top_k, 4) AT(fmoe_routing, tokens, 8) AT(fmoe_routing, choices, 16)
AT(fmoe_routing, weights, 24) AT(fmoe_routing, counts, 32) AT(fmoe_routing, balance_loss, 40)
AT(fmoe_routing, z_loss, 48) AT(fmoe_routing, dropped, 56) AT(fmoe_routing, moved, 64)

SIZE(fmoe_plan_options, 24)
AT(fmoe_plan_options, struct_size, 0) AT(fmoe_plan_options, shadowing, 4) AT(fmoe_plan_options, schedule, 8)
AT(fmoe_plan_options, group_size, 12) AT(fmoe_plan_options, shadows, 16)

SIZE(fmoe_plan_report, 72)
AT(fmoe_plan_report, struct_size, 0) AT(fmoe_plan_report, shadows, 4) AT(fmoe_plan_report, group_size, 8)
AT(fmoe_plan_report, steps, 12) AT(fmoe_plan_report, seconds_plain, 16) AT(fmoe_plan_report, seconds_planned, 24)
AT(fmoe_plan_report, seconds_ideal, 32) AT(fmoe_plan_report, compute_over_communicate, 40)
AT(fmoe_plan_report, flops_per_worker, 48) AT(fmoe_plan_report, seconds_semi_ideal, 56)
AT(fmoe_plan_report, compute_over_communicate_step, 64)

NUMBER(FMOE_OK, 0) NUMBER(FMOE_ERROR_ARGUMENT, 1) NUMBER(FMOE_ERROR_OPTIONS, 2) NUMBER(FMOE_ERROR_STAGE, 3)
NUMBER(FMOE_ERROR_FILE, 4) NUMBER(FMOE_ERROR_UNSUPPORTED, 5) NUMBER(FMOE_ERROR_MEMORY, 20)
NUMBER(FMOE_ERROR_TOPOLOGY, 21) NUMBER(FMOE_ERROR_PEER, 40) NUMBER(FMOE_ERROR_DISAGREE, 41)
NUMBER(FMOE_ERROR_TIMEOUT, 42) NUMBER(FMOE_ERROR_INTERNAL, 60) NUMBER(FMOE_STATUS_FORCE_32, 0x7fffffff)
NUMBER(FMOE_GELU, 0) NUMBER(FMOE_GELU_TANH, 1) NUMBER(FMOE_RELU, 2) NUMBER(FMOE_SILU, 3) NUMBER(FMOE_SWIGLU, 4)
NUMBER(FMOE_GATE_TOPK, 0) NUMBER(FMOE_GATE_NOISY, 1) NUMBER(FMOE_GATE_SWITCH, 2) NUMBER(FMOE_GATE_GSHARD, 3)
NUMBER(FMOE_GATE_BASE, 4) NUMBER(FMOE_GATE_TOPOLOGY, 5) NUMBER(FMOE_GATE_HIERARCHICAL, 6)
NUMBER(FMOE_GATE_SWIPE, 7)
NUMBER(FMOE_DROP_LAST, 0) NUMBER(FMOE_DROP_LIGHTEST, 1) NUMBER(FMOE_DROP_RANDOM, 2) NUMBER(FMOE_DROP_UNIMPORTANT, 3)
NUMBER(FMOE_VERSION_MAJOR, 0) /* raising it is what the head of this file is about */

int main(void) {
  const fmoe_layer_options initialised = FMOE_LAYER_OPTIONS_INIT;
  CHECK(initialised.struct_size == sizeof initialised, "%u", initialised.struct_size);
  uint32_t loaded = fmoe_version(), header = FMOE_VERSION_MAJOR << 16 | FMOE_VERSION_MINOR << 8 | FMOE_VERSION_PATCH;
  CHECK(loaded >> 16 == header >> 16 && loaded >= header, "the loaded library is %x, the header %x", loaded, header);
  return summary();
}
