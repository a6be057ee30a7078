// A program: every element of a tensor has one place in each of the layouts of csrc/cuda/layout.h,
// and places beyond 2^31 elements are where they have to be. Prints how many shapes it went
// through.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/layout.h"

using namespace poolformer::cuda;

namespace {

int64_t element(const Image& im, int64_t image, int channel, int row, int column) {
  const int64_t n = image * im.channels * int64_t{im.height} * im.width;
  if (im.channels_last) return n + (int64_t{row} * im.width + column) * im.channels + channel;
  return n + (int64_t{channel} * im.height + row) * im.width + column;
}

void require(bool right, const char* what, const Image& im) {
  if (right) return;
  std::printf("%s: (%lld, %d, %d, %d), %d groups, channels_last %d, dtype %d\n", what,
              static_cast<long long>(im.batch), im.channels, im.height, im.width, im.groups,
              im.channels_last, static_cast<int>(im.dtype));
  std::exit(1);
}

void visit(std::vector<int>& seen, const Image& im, int64_t offset, int vector) {
  for (int i = 0; i < vector; ++i) {
    require(offset + i >= 0 && offset + i < static_cast<int64_t>(seen.size()), "outside", im);
    ++seen[offset + i];
  }
}

void require_once(std::vector<int>& seen, const char* what, const Image& im) {
  for (int& count : seen) {
    require(count == 1, what, im);
    count = 0;
  }
}

void check_cover(const Image& im) {
  std::vector<int> seen(im.batch * im.channels * im.pixels());
  const int groups = static_cast<int>(im.batch) * im.groups, vector = im.vector();

  const Tiling t = choose_tiling(im);
  require(t.threads <= kThreads && t.blocks() <= 2 * kMostPartials, "a tiling too large", im);
  for (int block = 0; block < groups * t.blocks(); ++block) {
    for (int thread = 0; thread < t.threads; ++thread) {
      const Place p = place_of(im, t, block, thread);
      for (int row = p.row; row < p.end; ++row) {
        const int64_t offset = p.offset + row * im.row_stride();
        require(offset == element(im, p.image, p.channel, row, p.column), "misplaced", im);
        require(p.image_group == p.image * im.groups + p.channel / im.group_channels(),
                "in another group", im);
        if (p.inside) visit(seen, im, offset, vector);
      }
    }
  }
  require_once(seen, "tiling", im);

  for (const bool rows : {true, false}) {
    const Reduction r = rows ? choose_row_reduction(im) : choose_pixel_reduction(im);
    require(r.threads <= kThreads && r.columns * r.channels <= r.threads, "too many threads", im);
    const int across = rows ? im.width : im.pixels(), walked = rows ? im.height : 1;
    for (int block = 0; block < groups * r.blocks(); ++block) {
      for (int thread = 0; thread < r.threads; ++thread) {
        const ReductionPlace p = place_of(im, r, block, thread);
        if (!p.inside) continue;
        require(p.first_channel + p.lane * vector + vector <= p.last, "a cut vector", im);
        const int first = rows ? p.part * r.steps : 0;
        const int end = rows ? smaller(first + r.steps, walked) : 1;
        const int left = rows ? 0 : p.part * r.steps * r.columns;
        const int right = rows ? across : smaller(left + r.steps * r.columns, across);
        for (int row = first; row < end; ++row) {
          for (int column = left + p.column; column < right; column += r.columns) {
            visit(seen, im, p.offset + row * im.row_stride() + column * im.column_stride(), vector);
          }
        }
      }
    }
    require_once(seen, rows ? "rows" : "pixels", im);
  }

  for (int block = 0; block < groups * span_blocks(im, vector); ++block) {
    for (int thread = 0; thread < kThreads; ++thread) {
      const Span s = span_of(im, vector, block, thread);
      for (int u = 0; u < kUnroll; ++u) {
        const int index = s.first + u * kThreads;
        if (index >= s.vectors) continue;
        const int64_t offset = s.offset + offset_in_group(im, vector, index);
        const int channel = s.first_channel + channel_in_group(im, vector, index);
        const int64_t in_image = offset % (int64_t{im.channels} * im.pixels());
        require(channel == (im.channels_last ? in_image % im.channels : in_image / im.pixels()),
                "another channel", im);
        visit(seen, im, offset, vector);
      }
    }
  }
  require_once(seen, "spans", im);
}

// The last block and thread of a tensor of more than 2^31 elements.
void check_far(Image im) {
  im.batch = 4096, im.channels = 64, im.height = 112, im.width = 112, im.groups = 2;
  const int64_t last = im.batch - 1, end = im.batch * im.channels * im.pixels();
  const int groups = static_cast<int>(im.batch) * im.groups;
  const Tiling t = choose_tiling(im);
  const Place p = place_of(im, t, groups * t.blocks() - 1, t.threads - 1);
  require(p.image == last && p.offset == element(im, last, p.channel, 0, p.column), "far", im);
  for (const Reduction& r : {choose_row_reduction(im), choose_pixel_reduction(im)}) {
    const ReductionPlace q = place_of(im, r, groups * r.blocks() - 1, 0);
    require(q.image == last && q.offset == element(im, last, q.first_channel, 0, 0), "far sum", im);
  }
  const int blocks = groups * span_blocks(im, im.vector());
  const Span s = span_of(im, im.vector(), blocks - 1, 0);
  require(s.offset == element(im, last, s.first_channel, 0, 0), "far span", im);
  require(p.offset > int64_t{1} << 31 && s.offset < end, "not far", im);
}

}  // namespace

int main() {
  const int shapes[][5] = {{2, 64, 7, 7, 1},    {1, 96, 14, 14, 1}, {3, 20, 9, 5, 4},
                           {1, 13, 6, 11, 1},   {5, 8, 1, 1, 2},    {2, 320, 3, 14, 1},
                           {1, 512, 7, 7, 1},   {1, 3, 1, 700, 3},  {1, 1, 900, 1, 1},
                           {1, 2048, 2, 3, 1},  {1, 24, 70, 3, 3},  {40, 64, 28, 28, 1},
                           {1, 8, 1100, 40, 1}, {2, 1000, 5, 4, 1}, {300, 8, 9, 3, 1}};
  int checked = 0;
  for (const auto& s : shapes) {
    for (const bool channels_last : {false, true}) {
      for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
        Image im{dtype, channels_last, s[0], s[1], s[2], s[3], s[4]};
        check_cover(im);
        check_far(im);
        ++checked;
      }
    }
  }
  std::printf("checked %d\n", checked);
}
