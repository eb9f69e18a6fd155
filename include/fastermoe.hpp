// fastermoe.hpp: owners for the objects of fastermoe.h.  C++17, header only; that header stays the reference.
//
// Each class owns one C object, moves but does not copy, and destroys it when it goes.  Each member is the call of the
// same name; a failure throws Error.  Structs of the C header are used as they are: options() gives them with
// struct_size set and all else at its default.  A moved-from owner holds nullptr, which the calls report as a wrong
// argument.
#ifndef FASTERMOE_HPP
#define FASTERMOE_HPP
#include "fastermoe.h"

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastermoe {

class Error : public std::runtime_error {
 public:
  // Made on the thread that saw the failure, before its next call: the words are per thread.
  explicit Error(fmoe_status status)
      : std::runtime_error(std::string(fmoe_status_name(status)) + ": " + fmoe_last_error()), status_(status) {}
  fmoe_status status() const noexcept { return status_; }

 private:
  fmoe_status status_;
};

inline void check(fmoe_status status) {
  if (status != FMOE_OK) throw Error(status);
}

inline uint32_t version() noexcept { return fmoe_version(); }

// Any struct that starts with struct_size: `auto o = options<fmoe_layer_options>(); o.d_model = 64;`
template <typename Struct>
Struct options() noexcept {
  Struct defaults{};
  defaults.struct_size = static_cast<uint32_t>(sizeof(Struct));
  return defaults;
}
inline fmoe_transport transport_options() noexcept { return options<fmoe_transport>(); }
inline fmoe_group_options group_options() noexcept { return options<fmoe_group_options>(); }
inline fmoe_plan_options plan_options() noexcept { return options<fmoe_plan_options>(); }
inline fmoe_adamw_options adamw_options(double learning_rate) noexcept {
  auto required = options<fmoe_adamw_options>();
  required.learning_rate = learning_rate;
  return required;
}
inline fmoe_layer_options layer_options(int64_t d_model, int64_t d_hidden, int64_t experts) noexcept {
  auto required = options<fmoe_layer_options>();
  required.d_model = d_model;
  required.d_hidden = d_hidden;
  required.experts = experts;
  return required;
}

namespace detail {
template <auto destroy>
struct Destroy {
  template <typename Object>
  void operator()(Object *object) const noexcept { destroy(object); }
};
template <typename Object, auto destroy>
class Owner {
 public:
  explicit Owner(Object *owned) noexcept : object_(owned) {}  // takes over what a C call has created
  Object *get() const noexcept { return object_.get(); }
  Object *release() noexcept { return object_.release(); }    // the caller destroys it
  explicit operator bool() const noexcept { return object_ != nullptr; }

 protected:
  Owner() noexcept = default;
  // Fills an owner that exists already, so that nothing can throw between the call and the ownership.
  template <typename Create>
  void adopt(Create create) {
    Object *created = nullptr;
    check(create(&created));
    object_.reset(created);
  }

 private:
  std::unique_ptr<Object, Destroy<destroy>> object_;
};
}  // namespace detail

class Group : public detail::Owner<fmoe_group, fmoe_group_destroy> {
 public:
  using Owner::Owner;
  // One worker, alone.
  explicit Group(const fmoe_group_options &options = group_options()) {
    adopt([&](fmoe_group **out) { return fmoe_group_create_local(1, &options, out); });
  }
  // Collective; the transport's context is released with the group.
  explicit Group(const fmoe_transport &transport, const fmoe_group_options &options = group_options()) {
    adopt([&](fmoe_group **out) { return fmoe_group_create(&transport, &options, out); });
  }
  // `size` ranks as threads of this process: seat i is for the thread that plays rank i.
  static std::vector<Group> local(int32_t size, const fmoe_group_options &options = group_options()) {
    std::vector<fmoe_group *> seats(size > 0 ? static_cast<size_t>(size) : 0);
    std::vector<Group> groups;
    groups.reserve(seats.size());  // the last chance to throw before the seats exist
    check(fmoe_group_create_local(size, &options, seats.data()));
    for (fmoe_group *seat : seats) groups.emplace_back(seat);
    return groups;
  }
  void calibrate(double seconds) { check(fmoe_group_calibrate(get(), seconds)); }
};

class Pass : public detail::Owner<fmoe_pass, fmoe_pass_destroy> {
 public:
  using Owner::Owner;
  fmoe_routing routing() const {  // borrowed until the pass goes
    auto out = options<fmoe_routing>();
    check(fmoe_pass_routing(get(), &out));
    return out;
  }
  fmoe_plan_report plan(const fmoe_plan_options &options = plan_options()) {
    auto report = fastermoe::options<fmoe_plan_report>();
    check(fmoe_plan(get(), &options, &report));
    return report;
  }
  void forward(float *output) { check(fmoe_forward(get(), output)); }
  void backward(const float *grad_output, float *grad_tokens, float *grad_weights = nullptr) {
    check(fmoe_backward(get(), grad_output, grad_tokens, grad_weights));
  }
  void write_timeline(const std::string &path) { check(fmoe_pass_write_timeline(get(), path.c_str())); }
};

class Layer : public detail::Owner<fmoe_layer, fmoe_layer_destroy> {
 public:
  using Owner::Owner;
  Layer(Group &group, const fmoe_layer_options &options) {
    adopt([&](fmoe_layer **out) { return fmoe_layer_create(group.get(), &options, out); });
  }
  fmoe_tensors values() const {  // borrowed until the layer goes, as gradients() is
    auto out = options<fmoe_tensors>();
    check(fmoe_layer_values(get(), &out));
    return out;
  }
  fmoe_tensors gradients() const {
    auto out = options<fmoe_tensors>();
    check(fmoe_layer_gradients(get(), &out));
    return out;
  }
  void set_training(bool training) { check(fmoe_layer_set_training(get(), training)); }
  void zero_gradients() { check(fmoe_layer_zero_gradients(get())); }
  void begin_gradients() { check(fmoe_layer_begin_gradients(get())); }
  void reduce_gradients() { check(fmoe_layer_reduce_gradients(get())); }
  void adamw(const fmoe_adamw_options &options) { check(fmoe_layer_adamw(get(), &options)); }
  void save(const std::string &path) const { check(fmoe_layer_save(get(), path.c_str())); }
  void load(const std::string &path) { check(fmoe_layer_load(get(), path.c_str())); }

  // Tokens stay the caller's, unchanged, until backward.
  Pass gate(const float *tokens, int64_t n) {
    fmoe_pass *created = nullptr;
    check(fmoe_gate(get(), tokens, n, &created));
    return Pass(created);
  }
  Pass route(const float *tokens, int64_t n, const int32_t *choices, const float *weights) {
    fmoe_pass *created = nullptr;
    check(fmoe_route(get(), tokens, n, choices, weights, &created));
    return Pass(created);
  }
};

class Cluster : public detail::Owner<fmoe_cluster, fmoe_cluster_destroy> {
 public:
  using Owner::Owner;
  explicit Cluster(Group &group) {
    adopt([&](fmoe_cluster **out) { return fmoe_cluster_of_group(group.get(), out); });
  }
  explicit Cluster(const std::string &path) {
    adopt([&](fmoe_cluster **out) { return fmoe_cluster_read(path.c_str(), out); });
  }
  int32_t size() const noexcept { return fmoe_cluster_size(get()); }
  void write(const std::string &path) const { check(fmoe_cluster_write(get(), path.c_str())); }
  double remote_share() const noexcept { return fmoe_cluster_remote_share(get()); }
  fmoe_plan_report plan(const fmoe_layer_options &layer, const int64_t *counts /* [W, E] */,
                        const fmoe_plan_options &options = plan_options()) const {
    auto report = fastermoe::options<fmoe_plan_report>();
    check(fmoe_cluster_plan(get(), &layer, counts, &options, &report));
    return report;
  }
};

}  // namespace fastermoe
#endif
