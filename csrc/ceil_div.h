#pragma once

#include <cstdint>

namespace catimage_accel {

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace catimage_accel
