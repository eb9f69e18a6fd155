// owners.cpp: fastermoe.hpp owns, moves, throws and loses nothing; the numbers are layer.c's business.
#include <cstdio>
#include <cstring>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "fastermoe.hpp"

static int passed, failed;
#define CHECK(condition) \
  ((condition) ? ++passed : (++failed, std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition)))

// The call throws Error with this status, and the words of the library.
template <typename Call>
static bool throws(fmoe_status status, Call call) {
  try {
    call();
  } catch (const fastermoe::Error &error) {
    return error.status() == status && std::strstr(error.what(), fmoe_status_name(status)) &&
           std::strlen(error.what()) > std::strlen(fmoe_status_name(status)) + 2;
  }
  return false;
}

template <typename Owner>
constexpr bool moves_only = std::is_nothrow_move_constructible_v<Owner> && std::is_nothrow_move_assignable_v<Owner> &&
                            !std::is_copy_constructible_v<Owner> && !std::is_copy_assignable_v<Owner> &&
                            std::is_nothrow_destructible_v<Owner> && sizeof(Owner) == sizeof(void *);
static_assert(moves_only<fastermoe::Group> && moves_only<fastermoe::Layer> && moves_only<fastermoe::Pass> &&
              moves_only<fastermoe::Cluster>);
static_assert(std::is_base_of_v<std::runtime_error, fastermoe::Error>);

static const int64_t n = 9, d = 4, h = 6, experts = 3;

static void test_step() {
  auto threads = fastermoe::group_options();
  threads.threads = 2;
  fastermoe::Group group(threads);
  fastermoe::Layer layer(group, fastermoe::layer_options(d, h, experts));
  std::vector<float> x(n * d, 0.5f), y(n * d), grad(n * d, 1), grad_x(n * d);
  fmoe_tensors values = layer.values(), gradients = layer.gradients();
  CHECK(values.local_experts == experts && values.w1 && gradients.w2 && !values.w3);
  layer.zero_gradients();

  fastermoe::Pass pass = layer.gate(x.data(), n);
  fmoe_routing routing = pass.routing();
  CHECK(routing.tokens == n && routing.top_k == 2);
  CHECK(pass.plan().struct_size == sizeof(fmoe_plan_report));
  pass.forward(y.data());
  pass.backward(grad.data(), grad_x.data());
  layer.reduce_gradients();
  CHECK(gradients.b2[routing.choices[0] * d] != 0);
  CHECK(throws(FMOE_ERROR_STAGE, [&] { pass.forward(y.data()); }));

  std::vector<int32_t> choices(n * 2, 1);
  std::vector<float> weights(n * 2, 0.5f), grad_weights(n * 2);
  pass = layer.route(x.data(), n, choices.data(), weights.data());  // the old pass goes
  pass.plan(fastermoe::plan_options());
  pass.forward(y.data());
  pass.backward(grad.data(), grad_x.data(), grad_weights.data());
  CHECK(grad_weights[0] == grad_weights[1] && grad_weights[0] != 0);
}

static void test_moves() {
  fastermoe::Group group;
  fastermoe::Group moved = std::move(group);
  CHECK(!group && moved);  // said in the header
  CHECK(throws(FMOE_ERROR_ARGUMENT, [&] { fastermoe::Layer(group, fastermoe::layer_options(d, h, experts)); }));
  std::vector<fastermoe::Layer> layers;
  for (int i = 0; i < 5; i++) layers.emplace_back(moved, fastermoe::layer_options(d, h, experts));
  layers.erase(layers.begin() + 1);
  std::vector<float> x(n * d), y(n * d);
  layers[1].gate(x.data(), n).forward(y.data());
  fmoe_layer *mine = layers.back().release();
  CHECK(mine && !layers.back());
  fmoe_layer_destroy(mine);
  std::vector<fastermoe::Group> seats = fastermoe::Group::local(1);
  CHECK(seats.size() == 1 && seats[0]);
}

// Two ranks in one process, each seat moved into a thread of its own.
static void test_seats() {
  std::vector<fastermoe::Group> seats = fastermoe::Group::local(2);
  CHECK(seats.size() == 2);
  const auto step = [](fastermoe::Group seat) {
    fastermoe::Layer layer(seat, fastermoe::layer_options(d, h, 2 * experts));
    std::vector<float> x(n * d, 0.5f), y(n * d), grad(n * d, 1), grad_x(n * d);
    fastermoe::Pass pass = layer.gate(x.data(), n);
    pass.forward(y.data());
    pass.backward(grad.data(), grad_x.data());
    layer.reduce_gradients();
    return layer.values().first_expert;
  };
  int64_t first[2] = {-1, -1};
  std::thread other([&] { first[1] = step(std::move(seats[1])); });
  first[0] = step(std::move(seats[0]));
  other.join();
  CHECK(first[0] == 0 && first[1] == experts);
}

static void test_errors() {
  fastermoe::Group group;
  CHECK(throws(FMOE_ERROR_ARGUMENT, [&] { fastermoe::Layer(group, fastermoe::layer_options(d, h, -1)); }));
  CHECK(throws(FMOE_ERROR_ARGUMENT, [] { fastermoe::Group::local(0); }));
  CHECK(throws(FMOE_ERROR_ARGUMENT, [] { fastermoe::Group::local(-1); }));
  fastermoe::Layer layer(group, fastermoe::layer_options(d, h, experts));
  std::vector<float> x(n * d);
  CHECK(throws(FMOE_ERROR_ARGUMENT, [&] { layer.gate(x.data(), -1); }));
  CHECK(throws(FMOE_ERROR_ARGUMENT, [&] { layer.gate(nullptr, n); }));
  CHECK(throws(FMOE_ERROR_ARGUMENT, [] { fastermoe::Pass(nullptr).routing(); }));
  CHECK(throws(FMOE_ERROR_ARGUMENT, [] { fastermoe::Group over_nothing(fastermoe::transport_options()); }));
  CHECK(throws(FMOE_ERROR_ARGUMENT, [&] { group.calibrate(0); }));
  CHECK(throws(FMOE_ERROR_STAGE, [&] { fastermoe::Cluster of_group(group); }));
  CHECK(throws(FMOE_ERROR_FILE, [&] { layer.save("/no-such-folder/layer"); }));
  CHECK(throws(FMOE_ERROR_FILE, [&] { layer.load("no-such-file"); }));
  layer.adamw(fastermoe::adamw_options(0.1));
  CHECK(throws(FMOE_ERROR_ARGUMENT, [&] { layer.adamw(fastermoe::adamw_options(-1)); }));
  CHECK(throws(FMOE_ERROR_STAGE, [&] { layer.gate(x.data(), n).write_timeline("no-such-file"); }));
  CHECK(throws(FMOE_ERROR_FILE, [] { fastermoe::Cluster read(std::string("no-such-file")); }));
}

// Never called, but it compiles.
void use_the_rest(fastermoe::Cluster &cluster, const int64_t *counts, const std::string &path) {
  cluster.write(path);
  CHECK(cluster.size() > 0);
  cluster.plan(fastermoe::layer_options(d, h, experts), counts);
}

int main() {
  CHECK(fastermoe::version() == fmoe_version());
  test_step();
  test_moves();
  test_seats();
  test_errors();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
