// The memory layout of an image, for kernels that only add over pixels and so may take them in any
// order. Pixel p is the p-th along the rows, y * width + x.
#pragma once

#include "image.h"

namespace mghf {
namespace {

// The same pixels as one long row if their strides allow it: then a run of pixels may cross rows.
template <class View>
inline View merge_rows(View v) {
  if (v.width == 1) {
    v.column_stride = v.row_stride;
  } else if (v.height > 1 && v.row_stride != v.width * v.column_stride) {
    return v;
  }
  v.width *= v.height;
  v.height = 1;
  return v;
}

// Whether to go through an image map by map (contiguous) or pixel by pixel (channels_last, and any
// other layout).
template <class View>
inline bool lies_by_maps(const View& view) {
  const View v = merge_rows(view);
  return v.column_stride == 1 && (v.channel_stride != 1 || v.channels == 1);
}

}  // namespace
}  // namespace mghf
