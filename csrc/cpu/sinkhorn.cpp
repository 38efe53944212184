// Sinkhorn's plan of one matrix and its gradient, on the CPU. See sinkhorn_solver.h for the method.
//
// This file is compiled once per instruction set, as MGHF_KERNELS, so everything in it has internal
// linkage (see vector.h).

#include "sinkhorn.h"

#include "sinkhorn_solver.h"

namespace mghf {
namespace {

SolverUse use_for(bool backward) {
  return {.keep = backward, .computed = false, .settle = false};
}

// The similarities are given; there is nothing to compute.
constexpr auto kNothing = [](int64_t) { return true; };

// ---- one matrix ----

void store_plan(const Solver& s, int64_t t, float* plan) {
  const int64_t padded = s.padded;
  for (int64_t i = 0; i < s.n; i += kRows) {
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t j = 0; j < padded; j += kLanes) {
        at(s.rows + r * padded + j) = s.u(t)[i + r] * s.entry(i + r, j) * at(s.v(t) + j);
      }
    }
    s.store_rows(i, plan);
  }
}

// The gradient of log K for the gradient `grad` of the plan, left in place of K.
void differentiate(const Solver& s, MatrixView grad, Gradient& gradient) {
  const int64_t padded = s.padded, T = gradient.T;
  if (s.base(T) != 0) {
    gradient.robust([&](int64_t i) {
      s.load_rows(grad, i);
      // K still has the last iteration's base.
      for (int64_t k = 0; k < kRows && i + k < s.n; ++k) {
        for (int64_t j = 0; j < padded; j += kLanes) {
          at(s.rows + k * padded + j) *= s.u(T)[i + k] * s.entry(i + k, j) * at(s.v(T) + j);
        }
      }
    });
    return;
  }
  for (int64_t j = 0; j < padded; j += kLanes) at(gradient.dg + j) = Vec{};
  for (int64_t i = 0; i < padded; i += kRows) {
    s.load_rows(grad, i);
    for (int64_t k = 0; k < kRows; ++k) {
      Vec total = {};
      const float u = s.u(T)[i + k];
      for (int64_t j = 0; j < padded; j += kLanes) {
        const Vec w = at(s.rows + k * padded + j) * (u * s.entry(i + k, j) * at(s.v(T) + j));
        total += w;
        at(gradient.dg + j) += w;
      }
      gradient.df[i + k] = sum(total);
    }
  }
  gradient.sweep_back(0);
  const float *rows = s.rows, *u = s.u(T), *v = s.v(T);
  for (int64_t i = 0; i < s.n; i += kRows) {
    s.load_rows(grad, i);
    gradient.correct(i, [=, &s](int64_t k, int64_t j, Vec correction) {
      s.entry(i + k, j) *= at(rows + k * padded + j) * (u[i + k] * at(v + j)) - correction;
    });
  }
}

// From log K to the similarities: d score / d similarity is 1, -1, or the score itself for "exp".
void store_gradient(const Solver& s, float* out) {
  const float slope = static_cast<float>(1 / s.options.epsilon);
  for (int64_t i = 0; i < s.n; i += kRows) {
    if (s.options.cost == TransportCost::exp) s.scores(i);
    for (int64_t k = 0; k < kRows; ++k) {
      for (int64_t j = 0; j < s.padded; j += kLanes) {
        Vec& row = at(s.rows + k * s.padded + j);
        const Vec value = slope * s.entry(i + k, j);
        switch (s.options.cost) {
          case TransportCost::hard: row = value; break;
          case TransportCost::easy: row = -value; break;
          case TransportCost::exp: row = value * row; break;
        }
      }
    }
    s.store_rows(i, out);
  }
}

// ---- entry points ----

constexpr float kNaN = __builtin_nanf("");

void forward(const SinkhornOptions& options, MatrixView similarity, float* plan, void* workspace) {
  if (options.size == 1) {
    *plan = *similarity.data * 0;
    return;
  }
  Arena arena{static_cast<char*>(workspace)};
  const Solver solver(options, similarity, use_for(false), arena);
  const int64_t iterations = solver.solve(kNothing);
  if (iterations < 0) {
    for (int64_t i = 0; i < options.size * options.size; ++i) plan[i] = kNaN;
    return;
  }
  store_plan(solver, iterations, plan);
}

void backward(const SinkhornOptions& options, MatrixView grad, MatrixView similarity,
              float* grad_similarity, void* workspace) {
  if (options.size == 1) {
    *grad_similarity = *grad.data * 0;
    return;
  }
  Arena arena{static_cast<char*>(workspace)};
  const Solver solver(options, similarity, use_for(true), arena);
  const int64_t iterations = solver.solve(kNothing);
  if (iterations < 0) {
    for (int64_t i = 0; i < options.size * options.size; ++i) grad_similarity[i] = kNaN;
    return;
  }
  Gradient gradient(solver, iterations, iterations, arena);
  differentiate(solver, grad, gradient);
  store_gradient(solver, grad_similarity);
}

size_t workspace_bytes(const SinkhornOptions& options, bool with_gradient) {
  Arena arena{nullptr};
  const Solver solver(options, {}, use_for(with_gradient), arena);
  if (with_gradient) Gradient(solver, options.iterations, options.iterations, arena);
  return arena.used;
}

}  // namespace

const SinkhornKernels MGHF_KERNELS = {workspace_bytes, forward, backward};

}  // namespace mghf
