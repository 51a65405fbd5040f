// One level of the instruction set, named MARS_LEVEL. No header of the standard library may be included below here: its
// inline functions would be compiled for this level and linked for all.
namespace mars {
namespace MARS_LEVEL {

#include "numbers.h"
#include "codecs.h"
#include "weights.h"
#include "norms.h"
#include "steps.h"
#include "walk.h"
#include "early.h"

static const Kernels kKernels[kNumArithmetics] = {{measure<float>, update<float>, can_advance<float>, advance<float>, amend<float>},
                                                  {measure<double>, update<double>, can_advance<double>, advance<double>, amend<double>}};

}  // namespace MARS_LEVEL
}  // namespace mars
