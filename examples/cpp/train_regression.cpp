// train_regression: one mixture-of-experts layer learns a function in four pieces.
//
// Points lie in four clusters, each with a linear map of its own.  No one map fits all of them; a layer of four experts
// can give each cluster to one.  Training is a plain loop: gate, forward, loss, backward, Adam.
#include <cmath>
#include <cstdio>
#include <exception>
#include <random>
#include <vector>

#include <fastermoe.hpp>

namespace {

constexpr int64_t width = 8, hidden = 32, experts = 4, clusters = 4, batch = 512;

// Where the clusters are, and what each of them does to a point.
struct Pieces {
  std::vector<float> centres = std::vector<float>(clusters * width);
  std::vector<float> maps = std::vector<float>(clusters * width * width);

  explicit Pieces(std::mt19937 &random) {
    std::normal_distribution<float> normal;
    for (float &c : centres) c = 1.5f * normal(random);
    for (float &m : maps) m = normal(random) / std::sqrt(static_cast<float>(width));
  }
};

struct Batch {
  std::vector<int> cluster = std::vector<int>(batch);
  std::vector<float> points = std::vector<float>(batch * width), targets = std::vector<float>(batch * width);

  void draw(const Pieces &pieces, std::mt19937 &random) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < batch; i++) {
      cluster[i] = static_cast<int>(random() % clusters);
      const float *centre = &pieces.centres[cluster[i] * width], *map = &pieces.maps[cluster[i] * width * width];
      float *x = &points[i * width], *y = &targets[i * width];
      for (int64_t c = 0; c < width; c++) x[c] = centre[c] + 0.5f * normal(random);
      for (int64_t r = 0; r < width; r++) {
        y[r] = 0;
        for (int64_t c = 0; c < width; c++) y[r] += map[r * width + c] * x[c];
      }
    }
  }
};

// Adam over the parameter blocks of a layer.  Values and gradients are equal blocks, so any optimiser is such a loop.
class Adam {
 public:
  explicit Adam(fastermoe::Layer &layer) {
    fmoe_tensors v = layer.values(), g = layer.gradients();
    add(v.gate, g.gate, experts * width);
    add(v.w1, g.w1, experts * hidden * width);
    add(v.b1, g.b1, experts * hidden);
    add(v.w2, g.w2, experts * width * hidden);
    add(v.b2, g.b2, experts * width);
  }

  void step(float rate) {
    const float first = 0.9f, second = 0.99f;
    steps_++;
    float correction = std::sqrt(1 - std::pow(second, steps_)) / (1 - std::pow(first, steps_));
    for (Block &b : blocks_)
      for (size_t i = 0; i < b.mean.size(); i++) {
        float g = b.gradients[i];
        b.mean[i] += (1 - first) * (g - b.mean[i]);
        b.square[i] += (1 - second) * (g * g - b.square[i]);
        b.values[i] -= rate * correction * b.mean[i] / (std::sqrt(b.square[i]) + 1e-8f);
      }
  }

 private:
  struct Block {
    float *values;
    const float *gradients;
    std::vector<float> mean, square;
  };
  std::vector<Block> blocks_;
  float steps_ = 0;

  void add(float *values, const float *gradients, int64_t count) {
    blocks_.push_back({values, gradients, std::vector<float>(count), std::vector<float>(count)});
  }
};

void train() {
  std::mt19937 random(2022);
  Pieces pieces(random);
  Batch data;
  std::vector<float> output(batch * width), grad_output(batch * width), grad_points(batch * width);

  fmoe_layer_options options = fastermoe::layer_options(width, hidden, experts);
  options.top_k = 1;
  options.seed = 7;
  options.balance_loss = 0.05;  // without it, an expert that starts ahead may keep everything

  fastermoe::Group group;
  fastermoe::Layer layer(group, options);
  Adam adam(layer);
  for (int step = 0; step <= 1000; step++) {
    data.draw(pieces, random);
    layer.zero_gradients();
    fastermoe::Pass pass = layer.gate(data.points.data(), batch);
    pass.forward(output.data());
    float loss = 0;
    for (size_t i = 0; i < output.size(); i++) {
      float error = output[i] - data.targets[i];
      loss += error * error / static_cast<float>(output.size());
      grad_output[i] = 2 * error / static_cast<float>(output.size());
    }
    pass.backward(grad_output.data(), grad_points.data());
    adam.step(step < 700 ? 1e-2f : 1e-3f);
    if (step % 100 == 0) std::printf("step %4d  loss %.5f\n", step, static_cast<double>(loss));
  }

  data.draw(pieces, random);
  fastermoe::Pass pass = layer.gate(data.points.data(), batch);
  fmoe_routing routing = pass.routing();
  int went[clusters][experts] = {};
  for (int64_t i = 0; i < batch; i++) went[data.cluster[i]][routing.choices[i]]++;
  std::printf("\npoints of       to expert 0     1     2     3\n");
  for (int64_t c = 0; c < clusters; c++) {
    std::printf("cluster %d      ", static_cast<int>(c));
    for (int64_t e = 0; e < experts; e++) std::printf("%6d", went[c][e]);
    std::printf("\n");
  }
}

}  // namespace

int main() try {
  train();
  return 0;
} catch (const std::exception &error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
