// Tiles of NCHW that go by way of shared memory: which elements they, and threads, have. Plain C++,
// as layout.h.
#pragma once

#include "layout.h"

namespace poolformer::cuda {

// Tiles of NCHW that lie together in memory: planes (channels) of a group, or where these are large
// a band of rows of one. A lane is a column of a segment of rows; lanes go through segments, then
// planes.
struct Planes {
  int rows;                  // of a segment
  int bands, band_segments;  // of a plane; of a band
  int planes;                // of a tile: more than one only where a band is all of a plane
  int lanes, threads;
  int tiles;  // of a group
  int turns;  // tiles of a block that returns statistics, one after another

  POOLFORMER_HOST_DEVICE int blocks() const { return ceil_div(tiles, turns); }  // of a group
  POOLFORMER_HOST_DEVICE int elements(int width) const { return lanes / width * rows * width; }
};

// Of so many elements in shared memory, and of what shares a vector with the first and the last.
POOLFORMER_HOST_DEVICE constexpr int staged_bytes(int elements, int element_size) {
  return (elements * element_size / kVectorBytes + 2) * kVectorBytes;
}

inline Planes choose_planes(const Image& im) {
  Planes p{};
  const int most_rows = smaller(kScalarRows, kScalarRows * kThreads / im.width);
  p.rows = ceil_div(im.height, ceil_div(im.height, most_rows));
  const int segments = ceil_div(im.height, p.rows);
  const int fit = kThreads / im.width > 1 ? kThreads / im.width : 1;
  p.planes = segments <= fit ? fit / segments : 1;
  if (p.planes > 16) p.planes -= p.planes % 16;  // 16 planes of any size end on 32 bytes
  p.planes = smaller(p.planes, im.group_channels);
  p.bands = ceil_div(segments, fit);
  p.band_segments = ceil_div(segments, p.bands);
  p.bands = ceil_div(segments, p.band_segments);
  p.lanes = p.planes * p.band_segments * im.width;
  p.threads = whole_warps(ceil_div(p.lanes, ceil_div(p.lanes, kThreads)));
  p.tiles = ceil_div(im.group_channels, p.planes) * p.bands;
  p.turns = ceil_div(p.tiles, kMostPartials);
  return p;
}

struct PlaneTile {
  int band, first_plane, planes;  // planes: [first_plane, first_plane + planes) of the group
  int first_row, end_row;         // of each plane
  int begin, end;                 // elements of the group
  int halo_begin, halo_end;       // with the rows above and below that windows reach
};

POOLFORMER_HOST_DEVICE PlaneTile tile_of(const Image& im, const Planes& p, int tile) {
  PlaneTile t{};
  const int column = tile / p.bands;
  t.band = tile - column * p.bands;
  t.first_plane = column * p.planes;
  t.planes = smaller(p.planes, im.group_channels - t.first_plane);
  t.first_row = t.band * p.band_segments * p.rows;
  t.end_row = smaller(t.first_row + p.band_segments * p.rows, im.height);
  t.begin = (t.first_plane * im.height + t.first_row) * im.width;
  t.end = ((t.first_plane + t.planes - 1) * im.height + t.end_row) * im.width;
  t.halo_begin = t.begin - (t.first_row > 0 ? im.width : 0);
  t.halo_end = t.end + (t.end_row < im.height ? im.width : 0);
  return t;
}

struct PlaneLane {
  int plane;             // of the tile
  int row, end, column;  // rows [row, end)
  int offset;            // in the group, of the lane's pixel in row 0
  bool inside;
};

POOLFORMER_HOST_DEVICE PlaneLane lane_of(const Image& im, const Planes& p, const PlaneTile& t,
                                         int lane) {
  PlaneLane l{};
  const int segment = lane / im.width;
  l.column = lane - segment * im.width;
  l.plane = segment / p.band_segments;
  l.row = t.first_row + (segment - l.plane * p.band_segments) * p.rows;
  l.end = smaller(l.row + p.rows, t.end_row);
  l.offset = (t.first_plane + l.plane) * im.pixels() + l.column;
  l.inside = lane < p.lanes && l.plane < t.planes && l.row < l.end;
  return l;
}

// Of planes: a tile's sums are those of a part of its channels.
inline Reduction reduce_planes(const Image& im) {
  const Planes p = choose_planes(im);
  Reduction r{};
  r.parts = p.bands;
  r.channel_blocks = p.tiles / p.bands;
  return r;
}

// Partial statistics of the result of blocks that write a tensor.
inline int result_partials(const Image& im) {
  return im.in_planes() ? choose_planes(im).blocks() : choose_tiling(im).blocks();
}

// Of sums along rows, and of sums over pixels.
inline Reduction row_reduction(const Image& im) {
  return im.in_planes() ? reduce_planes(im) : choose_row_reduction(im);
}
inline Reduction pixel_reduction(const Image& im) {
  return im.in_planes() ? reduce_planes(im) : choose_pixel_reduction(im);
}

}  // namespace poolformer::cuda
