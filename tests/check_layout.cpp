// A program: every element of a tensor has one place in each of the layouts of csrc/cuda/layout.h,
// and places beyond 2^31 elements are where they have to be. Prints how many shapes it went
// through.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/planes.h"

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

void check_tiling(const Image& im, std::vector<int>& seen) {
  const Tiling t = choose_tiling(im);
  require(t.threads <= kThreads && t.blocks() <= 2 * kMostPartials, "a tiling too large", im);
  for (int64_t number = 0; number < im.image_groups(); ++number) {
    const Group group(im, number);
    for (int block = 0; block < t.blocks(); ++block) {
      for (int thread = 0; thread < t.threads; ++thread) {
        const Place p = place_of(im, t, block % t.lane_blocks, block / t.lane_blocks, thread);
        for (int row = p.row; row < p.end; ++row) {
          const int64_t offset = group.offset + p.offset + row * im.row_stride();
          const int channel = group.first_channel + p.channel;
          require(offset == element(im, group.image, channel, row, p.column), "misplaced", im);
          if (p.inside) visit(seen, im, offset, im.vector);
        }
      }
    }
  }
  require_once(seen, "tiling", im);
}

void check_reduction(const Image& im, bool rows, std::vector<int>& seen) {
  const Reduction r = rows ? choose_row_reduction(im) : choose_pixel_reduction(im);
  require(r.threads <= kThreads && r.columns * r.channels <= r.threads, "too many threads", im);
  require(r.parts <= kMostParts, "too many parts", im);
  const int across = rows ? im.width : im.pixels();
  for (int64_t number = 0; number < im.image_groups(); ++number) {
    const Group group(im, number);
    for (int block = 0; block < r.blocks(); ++block) {
      const int part = block / r.channel_blocks;
      for (int thread = 0; thread < r.threads; ++thread) {
        const ReductionPlace p = place_of(im, r, block % r.channel_blocks, thread);
        if (!p.inside) continue;
        require(p.first_channel + (p.lane + 1) * im.vector <= p.last, "a cut vector", im);
        const int first = rows ? part * r.steps : 0;
        const int end = rows ? smaller(first + r.steps, im.height) : 1;
        const int left = rows ? 0 : part * r.steps * r.columns;
        const int right = rows ? across : smaller(left + r.steps * r.columns, across);
        for (int row = first; row < end; ++row) {
          for (int column = left + p.column; column < right; column += r.columns) {
            const int in_group = p.offset + row * im.row_stride() + column * im.column_stride();
            visit(seen, im, group.offset + in_group, im.vector);
          }
        }
      }
    }
  }
  require_once(seen, rows ? "rows" : "pixels", im);
}

void check_planes(const Image& im, std::vector<int>& seen) {
  const Planes p = choose_planes(im);
  require(p.threads <= kThreads && p.blocks() <= kMostPartials, "tiles too large", im);
  require(result_partials(im) == p.blocks(), "other partial statistics", im);
  const int elements = p.elements(im.width), whole = 16 * im.pixels();
  require(staged_bytes(elements + 2 * im.width, 4) + staged_bytes(elements, 4) + 4 * p.lanes <=
              48 << 10,
          "too much shared memory", im);
  std::vector<int> staged(seen.size());
  for (int64_t number = 0; number < im.image_groups(); ++number) {
    const Group group(im, number);
    for (int index = 0; index < p.tiles; ++index) {
      const PlaneTile t = tile_of(im, p, index);
      require(t.end - t.begin <= elements && t.begin < t.end, "a tile too long", im);
      require(t.planes <= 16 || t.begin % whole == 0, "a tile out of line", im);
      require(t.halo_begin <= t.begin && t.halo_end >= t.end, "no halo", im);
      for (int i = t.begin; i < t.end; ++i) ++staged[group.offset + i];
      for (int thread = 0; thread < p.lanes; ++thread) {
        const PlaneLane l = lane_of(im, p, t, thread);
        if (!l.inside) continue;
        require(l.row > 0 ? l.offset + (l.row - 1) * im.width >= t.halo_begin : true, "above", im);
        require(l.end < im.height ? l.offset + l.end * im.width < t.halo_end : true, "below", im);
        for (int row = l.row; row < l.end; ++row) {
          const int64_t offset = group.offset + l.offset + row * im.width;
          const int channel = group.first_channel + t.first_plane + l.plane;
          require(offset == element(im, group.image, channel, row, l.column), "misplaced", im);
          visit(seen, im, offset, 1);
        }
      }
    }
  }
  require_once(seen, "planes", im);
  require_once(staged, "staged", im);
}

void check_spans(const Image& im, std::vector<int>& seen) {
  const int vector = span_vector(im);
  for (int64_t number = 0; number < im.image_groups(); ++number) {
    const Group group(im, number);
    for (int block = 0; block < span_blocks(im, vector); ++block) {
      for (int thread = 0; thread < kThreads; ++thread) {
        for (int u = 0; u < kUnroll; ++u) {
          const int index = span_index(block, thread, u);
          if (index >= im.group_size() / vector) continue;
          const int64_t offset = group.offset + offset_in_group(im, vector, index);
          const SpanPlace place = span_place(im, vector, index);
          const int64_t in_image = offset % (int64_t{im.channels} * im.pixels());
          const int channel = group.first_channel + place.channel;
          if (im.channels_last) {
            require(channel == in_image % im.channels, "another channel", im);
          } else {
            require(channel * int64_t{im.pixels()} + place.pixel == in_image, "another pixel", im);
          }
          visit(seen, im, offset, vector);
        }
      }
    }
  }
  require_once(seen, "spans", im);
}

// The last group of a tensor of more than 2^31 elements.
void check_far(const Image& near) {
  const Image im(near.dtype, near.channels_last, 4096, 64, 112, 112, 2);
  const Group group(im, im.image_groups() - 1);
  require(group.image == 4095 && group.first_channel == 32, "another group", im);
  require(group.offset == element(im, 4095, 32, 0, 0), "far", im);
  require(group.offset > int64_t{1} << 31, "not far", im);
}

}  // namespace

int main() {
  const int shapes[][5] = {
      {2, 64, 7, 7, 1},    {1, 96, 14, 14, 1}, {3, 20, 9, 5, 4},   {1, 13, 6, 11, 1},
      {5, 8, 1, 1, 2},     {2, 320, 3, 14, 1}, {1, 512, 7, 7, 1},  {1, 3, 1, 700, 3},
      {1, 1, 900, 1, 1},   {1, 2048, 2, 3, 1}, {1, 24, 70, 3, 3},  {40, 64, 28, 28, 1},
      {1, 8, 1100, 40, 1}, {2, 1000, 5, 4, 1}, {300, 8, 9, 3, 1},  {1, 1, 700000, 1, 1},
      {1, 3, 40, 896, 1},  {2, 2, 20, 897, 2}, {1, 6, 5, 4000, 1}, {1, 64, 224, 224, 1}};
  int checked = 0;
  for (const auto& s : shapes) {
    for (const bool channels_last : {false, true}) {
      for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
        const Image im(dtype, channels_last, s[0], s[1], s[2], s[3], s[4]);
        std::vector<int> seen(im.batch * im.channels * im.pixels());
        if (im.in_planes()) {
          check_planes(im, seen);
        } else {
          check_tiling(im, seen);
          check_reduction(im, true, seen);
          check_reduction(im, false, seen);
        }
        check_spans(im, seen);
        check_far(im);
        ++checked;
      }
    }
  }
  std::printf("checked %d\n", checked);
}
