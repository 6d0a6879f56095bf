// Placeholder until the real kernels are in: the scalar ones.
#include "kernels.h"
#include "ops.h"
namespace bittern {
const Kernels kernels_neon = kernels_scalar;
}
