// The op `dec` on CUDA: argument checks and the calls of its kernels.
#include "../dec.h"

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "../../common/dec_options.h"
#include "matrices.h"

namespace {

using namespace mghf;
using namespace mghf::cuda;

Matrices check_patches(const Tensor& patches, const char* argument) {
  check_cuda(patches, argument);
  check_dimensions(patches, argument, 2);
  STD_TORCH_CHECK(patches.size(0) <= kMostDecPatches && patches.size(1) <= kMostDecValues, argument,
                  " has shape ", shape_of(patches),
                  "; allowed are up to 2^30 patches of up to 2^24 values");
  return {patches.const_data_ptr(), check_element(patches, argument), 1, patches.size(0),
          patches.size(1),          0, patches.stride(0), patches.stride(1)};
}

// The patches and what is asked of them, checked.
struct Problem {
  Matrices sr, gt;
  DecOptions options;
  bool inside;  // whether the temperatures are

  Problem(const Tensor& sr, const Tensor& gt, double threshold_db, double positive_temperature,
          double negative_temperature, const std::string& temperature,
          const std::string& similarity, double max_value, double norm_floor)
      : sr(check_patches(sr, "sr")),
        gt(check_patches(gt, "gt")),
        options(check_dec_options(sr.size(0), sr.size(1), threshold_db, positive_temperature,
                                  negative_temperature, temperature, similarity, max_value,
                                  norm_floor)),
        inside(temperature == "inside") {
    check_same_shape(gt, "gt", sr, "sr");
    check_same_device(gt, "gt", sr, "sr");
  }
};

std::tuple<Tensor, Tensor> dec_op(const Tensor& sr, const Tensor& gt, double threshold_db,
                                  double positive_temperature, double negative_temperature,
                                  const std::string& temperature, const std::string& similarity,
                                  double max_value, double norm_floor) {
  const Problem problem(sr, gt, threshold_db, positive_temperature, negative_temperature,
                        temperature, similarity, max_value, norm_floor);
  const Launcher launcher(sr);
  const std::vector<int64_t> scalar, rows{2, sr.size(0)};
  if (sr.numel() == 0) {
    return {torch::stable::new_zeros(sr, scalar, ScalarType::Float),
            torch::stable::new_zeros(sr, rows, ScalarType::Float)};
  }
  Tensor loss = torch::stable::new_empty(sr, scalar, ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(sr, rows, ScalarType::Float);
  const Tensor workspace = new_workspace(sr, dec_workspace_bytes(problem.options));
  // 1 / t outside the exponentials
  const double offset = problem.inside ? 0 : std::log(negative_temperature / positive_temperature);
  check_launch(dec(problem.options, problem.sr, problem.gt, offset, loss.mutable_data_ptr<float>(),
                   statistics.mutable_data_ptr<float>(), workspace.mutable_data_ptr(),
                   launcher.stream()),
               "dec");
  return {loss, statistics};
}

Tensor dec_backward_op(const Tensor& grad, const Tensor& sr, const Tensor& gt,
                       const Tensor& statistics, double threshold_db, double positive_temperature,
                       double negative_temperature, const std::string& temperature,
                       const std::string& similarity, double max_value, double norm_floor) {
  const Problem problem(sr, gt, threshold_db, positive_temperature, negative_temperature,
                        temperature, similarity, max_value, norm_floor);
  check_float32(grad, "grad", 0);
  check_float32(statistics, "statistics", 2);
  check_shape(statistics, "statistics", {2, sr.size(0)});
  check_same_device(grad, "grad", sr, "sr");
  check_same_device(statistics, "statistics", sr, "sr");
  const Launcher launcher(sr);
  Tensor grad_sr = torch::stable::new_empty(sr, std::vector<int64_t>{sr.size(0), sr.size(1)});
  if (sr.numel() == 0) return grad_sr;
  const Tensor dense = torch::stable::contiguous(statistics);
  const Tensor workspace = new_workspace(sr, dec_backward_workspace_bytes(problem.options));
  const DecScales scales{
      static_cast<float>(problem.inside ? 1 / positive_temperature : 1),
      static_cast<float>(problem.inside ? 1 / negative_temperature : 1),
  };
  check_launch(dec_backward(problem.options, scales, grad.const_data_ptr<float>(), problem.sr,
                            problem.gt, dense.const_data_ptr<float>(), grad_sr.mutable_data_ptr(),
                            workspace.mutable_data_ptr(), launcher.stream()),
               "dec_backward");
  return grad_sr;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, MGHF_DISPATCH_KEY, m) {
  m.impl("dec", TORCH_BOX(&dec_op));
  m.impl("dec_backward", TORCH_BOX(&dec_backward_op));
}
