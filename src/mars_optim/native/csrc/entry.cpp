// What the library exports.
#include <new>
#include <stdexcept>

#include "abi.h"
#include "plan.h"

namespace mars {
namespace {

bool within(int32_t value, int32_t limit) { return value >= 0 && value < limit; }

bool is_valid(const Call& c) {
    const bool is_double = c.arithmetic == kDouble;
    const int32_t formats[] = {c.x_format, c.g_format, c.prev_format, c.m_format, c.v_format, c.out_format};
    for (int32_t format : formats)
        if (!within(format, kNumFormats) || (format == kF64 && !is_double)) return false;
    const bool is_narrow = c.x_format == kBF16 || c.x_format == kF16;
    return within(c.op, kNumOps) && within(c.arithmetic, kNumArithmetics) && within(c.rounding, kNumRoundings) &&
           (is_double ? c.x_format == kF64 : is_narrow || c.x_format == kF32) && (is_narrow || c.rounding == kNearest) &&
           c.g_format != kQ8 && c.out_format != kQ8;
}

}  // namespace
}  // namespace mars

MARS_EXPORT int32_t mars_abi_version() { return mars::kAbiVersion; }

// Bit i: level i was compiled and this CPU has it.
MARS_EXPORT int32_t mars_isa_levels() {
    int32_t levels = 0;
    for (int32_t isa = 0; isa < mars::kNumIsas; ++isa) levels |= mars::kernels_for(isa, mars::kFloat) ? 1 << isa : 0;
    return levels;
}

// `sums`: three doubles a tensor, for kProducts; else null, or g.g or a little more in the first of each where there is a
// clip to find. `has_begun`, if given, becomes 1 before anything else is written. Returns a Status.
MARS_EXPORT int32_t mars_run(int32_t isa, const mars::Call* call, const mars::Record* records, int64_t count,
                             double* sums, uint8_t* has_begun) {
    using namespace mars;
    if (!is_valid(*call) || (call->op == kProducts && !sums)) return kBadCall;
    const Kernels* kernels = kernels_for(isa, call->arithmetic);
    if (!kernels) return kBadIsa;
    try {
        Plan plan(*call, records, count, *kernels, sums);
        if (has_begun) *has_begun = 1;
        plan.run();
    } catch (const std::invalid_argument&) {
        return kBadCall;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
    return kOk;
}

// Adds to each number, a float or a double, and tells what it is then. Step counts are numbers in memory of their own.
MARS_EXPORT void mars_add(void* const* numbers, int64_t count, int32_t is_double, double increment, double* values) {
    for (int64_t i = 0; i < count; ++i) {
        if (is_double) {
            values[i] = *static_cast<double*>(numbers[i]) += increment;
        } else {
            values[i] = *static_cast<float*>(numbers[i]) += float(increment);
        }
    }
}
