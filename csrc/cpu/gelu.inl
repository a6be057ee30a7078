// GELU for vectors of 16 floats, by tables that a permutation of registers looks up.
#pragma once

#include "vec.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

#if POOLFORMER_VECTOR_BYTES == 64
// As in math.h x Phi(x) = max(x, 0) - |x| Q(|x|), and its derivative is Q(|x|) R(|x|) for x < 0, 1
// minus that otherwise, where R(a) = 1 - a phi(a) / Q(a). Row p of a table has the coefficients of
// the power p, column i those for i / 2 - 1/4 <= a <= i / 2 + 1/4. All are least squares reweighted
// towards the minimax, each coefficient rounded before the others are fitted again: kTail to 1.1e-7
// and kTailToBf16 to 1.6e-4 of log2 Q, the others to 1.8e-7 and 3.9e-4 of max(|R|, |1 - R|, 1 / 4).
// clang-format off
alignas(64) constexpr float kTail[5][32] = {
    {9.223372e18, 5.6915136e18, 2.9266732e18, 1.2323754e18, 4.196659e17, 1.1454812e17,
     2.4901226e16, 4.2912495e15, 5.842313e14, 6.2676013e13, 5.2877884e12, 3.5029562e11,
     1.819933e10, 7.408214e8, 23608376.0, 588615.7, 11475.647, 174.86656, 2.0818784, .019358965,
     1.4056149e-4, 7.967161e-7, 3.524545e-9, 1.2167052e-11, 3.2770312e-14, 6.885366e-17,
     1.1284177e-19, 1.4423155e-22, 1.4376539e-25, 1.1174106e-28, 6.771738e-32},
    {-1.1510913, -1.646227, -2.2003047, -2.7969198, -3.4238257, -4.07236, -4.7365103, -5.4121137,
     -6.0962625, -6.786899, -7.4825435, -8.182116, -8.884812, -9.590029, -10.297301, -11.006272,
     -11.716658, -12.428234, -13.140821, -13.854273, -14.568469, -15.283311, -15.998716,
     -16.714615, -17.43095, -18.14767, -18.864737, -19.582108, -20.299755, -21.017649, -21.73577},
    {-.45947498, -.5276818, -.5777309, -.6134689, -.63891244, -.6571678, -.67045283, -.6802802,
     -.6876748, -.6933533, -.6977567, -.7012481, -.7040413, -.7063059, -.70817286, -.7097255,
     -.7110122, -.71210515, -.7130502, -.71384054, -.71453434, -.71513736, -.71566355, -.71613085,
     -.7165303, -.71689284, -.71721613, -.7175208, -.717774, -.7180043, -.71823597},
    {-.0508249, -.0391302, -.0281548, -.0200219, -.0143029, -.010321, -.00757271, -.00565478,
     -.00429679, -.00331471, -.00260673, -.00207292, -.00167147, -.00136427, -.00113582,
     -9.31735e-4, -7.88278e-4, -6.6802e-4, -5.65675e-4, -4.92881e-4, -4.29251e-4, -3.77443e-4,
     -3.25614e-4, -3.04445e-4, -2.65146e-4, -2.45357e-4, -1.90096e-4, -1.83339e-4, -1.5378e-4,
     -1.69622e-4, -2.16144e-4},
    {.0037105, .0062057, .0047801, .003371, .0023688, .0016531, .0011769, 8.1503e-4, 4.9587e-4,
     4.7138e-4, 2.2285e-4, 2.1082e-4, 1.3485e-4, 4.1843e-5, 8.4829e-5, 1.638e-4, 3.7704e-5,
     3.7896e-6, 1.6856e-4, 1.596e-5, 3.2883e-5, 4.1898e-5, 3.1215e-5, 8.2719e-5, -5.7235e-5,
     -7.4813e-5, -9.159e-5, 1.1227e-4, -9.6641e-6, -8.1417e-5, -1.5945e-4}};
alignas(64) constexpr float kRatio[5][32] = {
    {1e0, .42946112, -.5251352, -1.9080157, -3.746431, -6.056862, -8.849296, -12.129869,
     -15.902429, -20.16944, -24.93252, -30.192757, -35.950897, -42.20746, -48.96282, -56.217247,
     -63.970943, -72.22406, -80.97671, -90.22897, -99.980934, -110.23263, -120.98412, -132.23541,
     -143.98657, -156.2376, -168.9885, -182.23932, -195.99005, -210.2407, -224.9913},
    {-.7978844, -1.5068356, -2.3260353, -3.2143557, -4.1446567, -5.1003103, -6.0714216, -7.052126,
     -8.038916, -9.029656, -10.023022, -11.018171, -12.014556, -13.011819, -14.009713, -15.008069,
     -16.00677, -17.00573, -18.00489, -19.004206, -20.00364, -21.003172, -22.002773, -23.002449,
     -24.002165, -25.001925, -26.001722, -27.00154, -28.001387, -29.001251, -30.001146},
    {-.6366253, -.7721716, -.8593749, -.912821, -.9450763, -.9646337, -.976684, -.9841916,
     -.9890346, -.9922247, -.9943595, -.9958482, -.996695, -.9976503, -.998277, -.9986488,
     -.9990042, -.9990867, -.9992983, -.9996572, -.9992847, -.999949, -.9987517, -1.000417,
     -.999498, -.9994074, -1.00053, -.9994594, -.9993601, -.9997308, -1.000123},
    {-.10895, -.0728609, -.0454218, -.0275115, -.0165977, -.0101146, -.00627011, -.00398901,
     -.00259804, -.00172677, -.0011766, -7.982e-4, -5.96174e-4, -4.17284e-4, -2.86231e-4,
     -2.13875e-4, -1.7058e-4, -1.40469e-4, -9.2646e-5, -5.0461e-5, -6.80709e-5, -1.58466e-5,
     -1.30699e-4, 2.17011e-5, -4.03816e-5, -4.43388e-5, 4.08549e-5, -6.71125e-5, -2.72117e-5,
     -4.87282e-5, -.00151573},
    {.018952, .016291, .011281, .0070133, .0041629, .0025782, .0020086, 8.6279e-4, 4.6784e-4,
     3.3156e-4, 9.0839e-5, 2.5407e-4, -.002661, 6.7078e-4, .0020494, .001647, .0025185, 2.7327e-4,
     8.6054e-4, .00432, -.0031195, .0058596, -.013788, .011201, -.0037659, -.0057504, .011194,
     -.0058142, -.0076923, -.0021951, -.0030182}};
alignas(64) constexpr float kTailToBf16[3][32] = {
    {-1.0000242, -1.004258, -1.0318158, -1.0867691, -1.1637924, -1.2554115, -1.3559356, -1.458806,
     -1.5622084, -1.6645997, -1.7633592, -1.8593363, -1.9514768, -2.0410259, -2.1274922,
     -2.2062824, -2.2841508, -2.35886, -2.427447, -2.4954538, -2.5615907, -2.6242218, -2.6935225,
     -2.74419, -2.799003, -2.8588457, -2.9074123, -2.9598188, -3.0165856, -3.0572877, -3.100617},
    {-1.14936, -1.12086, -1.04682, -.958258, -.869696, -.787844, -.714466, -.650979, -.595665,
     -.547355, -.505668, -.469015, -.436893, -.408192, -.382559, -.360817, -.340695, -.322565,
     -.306852, -.2921, -.278492, -.266232, -.253336, -.244332, -.234967, -.225182, -.217548,
     -.209618, -.201364, -.195658, -.18977},
    {-.4781, -.5272, -.5774, -.6132, -.6387, -.657, -.6704, -.6802, -.6876, -.6933, -.6977,
     -.7012, -.704, -.7063, -.7082, -.7097, -.711, -.7121, -.713, -.7138, -.7145, -.7151, -.7157,
     -.7161, -.7165, -.7169, -.7172, -.7175, -.7178, -.718, -.7182}};
alignas(64) constexpr float kRatioToBf16[3][32] = {
    {.999945, .992064, .946606, .864967, .767211, .668829, .578229, .498023, .429731, .372336,
     .325379, .284448, .24824, .220889, .198396, .17774, .160093, .139741, .132154, .115162,
     .105506, .0947959, .0948626, .0824128, .0826304, .0677435, .0676629, .0679511, .0489932,
     .0484993, .0482728},
    {-.79412, -.74063, -.61552, -.48173, -.36823, -.27978, -.21331, -.16362, -.12704, -.099939,
     -.08008, -.06441, -.051789, -.043038, -.036331, -.030582, -.02598, -.021038, -.019296,
     -.015609, -.013644, -.011574, -.01158, -.0093483, -.0093667, -.0069264, -.00692, -.0069417,
     -.0041887, -.004154, -.0041386},
    {-.6762, -.7694, -.8563, -.9113, -.9443, -.9642, -.9764, -.9841, -.989, -.9922, -.9943,
     -.9958, -.9969, -.9976, -.9981, -.9985, -.9988, -.9991, -.9992, -.9994, -.9995, -.9996,
     -.9996, -.9997, -.9997, -.9998, -.9998, -.9998, -.9999, -.9999, -.9999}};
// clang-format on

// The column of a, in the low five bits, and its centre: 2 a is rounded to an integer.
constexpr float kToColumn = 6291456.f;  // 1.5 * 2^22
PF_INLINE Vec<float> column(const float (&row)[32], Vec<float> a) {
  return _mm512_permutex2var_ps(_mm512_load_ps(row), bit_cast<__m512i>(a),
                                _mm512_load_ps(row + 16));
}
PF_INLINE Vec<float> nearest(Vec<float> x) {
  return _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
PF_INLINE Vec<float> times_power_of_two(Vec<float> x, Vec<float> n) {
  return _mm512_maskz_scalef_ps(0xffff, x, n);
}

// From |x|, Q(|x|) = scale power, and R(|x|); |x| above 15, where the tail is 0, has no column.
PF_INLINE ValueAndSlope<Vec<float>> gelu_of_parts(Vec<float> x, Vec<float> a, Vec<float> scale,
                                                  Vec<float> a_scale, Vec<float> power,
                                                  Vec<float> ratio) {
  const Vec<float> zero = {}, limit = zero + 15.f;
  __mmask16 near = _mm512_cmp_ps_mask(a, limit, _CMP_NGT_UQ);  // or NaN, which stays
  Vec<float> tail = _mm512_maskz_mul_ps(near, scale * ratio, power);
  Vec<float> positive = _mm512_maskz_max_ps(0xffff, zero, x);
  return {_mm512_mask3_fnmadd_ps(a_scale, power, positive, near), x < zero ? tail : 1.f - tail};
}

// Q(g + d) = c0 2^(c1 d + ...), c1 d without rounding. Over all floats the value has at most 3.5
// ulp for x > 0, 4.7 for x < 0 where it is normal; the slope is off by 1.5e-7, in the tail 4e-7 of
// it.
PF_INLINE ValueAndSlope<Vec<float>> gelu_by_table(Vec<float> x) {
  Vec<float> a = magnitude(x), i = a + kToColumn, d = a - (i - kToColumn), square = d * d;
  Vec<float> c1 = column(kTail[1], i);
  Vec<float> rest = (column(kTail[4], i) * d + column(kTail[3], i)) * d + column(kTail[2], i);
  Vec<float> n = nearest(c1 * d);
  Vec<float> f = _mm512_fmadd_ps(rest, square, _mm512_fmsub_ps(c1, d, n));
  Vec<float> power = f * (1.30613788e-3f * kTiny) + 9.67764668e-3f * kTiny;  // 2^f: to 1e-7
  power = power * f + 5.5513218e-2f * kTiny;
  power = power * f + 0.2402208f * kTiny;
  power = power * f + 0.69314659f * kTiny;
  power = power * f + kTiny;
  Vec<float> scale = times_power_of_two(column(kTail[0], i), n);
  Vec<float> ratio = (column(kRatio[4], i) * d + column(kRatio[3], i)) * square +
                     (column(kRatio[2], i) * d + column(kRatio[1], i));
  ratio = ratio * d + column(kRatio[0], i);
  return gelu_of_parts(x, a, scale, a * scale, power, ratio);
}

// For a result that becomes bfloat16: Q(a) = 2^(c0 + c1 a + c2 a^2). The value has a relative error
// of 1.6e-4, the slope one of 4.7e-4 of the larger of it and x phi(x).
PF_INLINE ValueAndSlope<Vec<float>> gelu_to_bf16(Vec<float> x) {
  const Vec<float> one = Vec<float>{} + 1.f;
  Vec<float> a = magnitude(x), i = a + kToColumn;
  Vec<float> log =
      (column(kTailToBf16[2], i) * a + column(kTailToBf16[1], i)) * a + column(kTailToBf16[0], i);
  Vec<float> n = nearest(log), f = log - n;
  Vec<float> power = ((f * 5.5171408e-2f + 0.2426111f) * f + 0.693261f) * f + 0.99992806f;
  Vec<float> ratio = (column(kRatioToBf16[2], i) * a + column(kRatioToBf16[1], i)) * a +
                     column(kRatioToBf16[0], i);
  return gelu_of_parts(x, a, times_power_of_two(one, n), times_power_of_two(a, n), power, ratio);
}
#endif

}  // namespace poolformer::cpu::POOLFORMER_ISA
