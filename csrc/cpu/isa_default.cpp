// The kernels for any CPU.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define POOLFORMER_ISA baseline
#define POOLFORMER_TABLE kernels_default
#define POOLFORMER_NAME "default"
#define POOLFORMER_VECTOR_BYTES 16
#define POOLFORMER_ROWS 6
#define POOLFORMER_GROUP 1
#define POOLFORMER_CHUNK 96

#include "kernels.inl"
