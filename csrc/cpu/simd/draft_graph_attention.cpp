// One work item is a chunk of what belongs to one request and one K/V head: its rows times the heads that share the K/V
// head, a *lane* each. So all nodes share one pass over the paged context, tile by tile:
//
//   stored positions   |--- tile ---|--- tile ---|--- tile ---|      tiles begin at multiples of kTile
//   a node's context     [=================)   [===========)
//   its segments         [==========|======)   |[==========)         one step of online softmax each
//
// Before them come a node's own rows, in tiles from its first one, while the first stored tile is on its way. A step's
// segment is seen by all its lanes whole, so there are no masks along positions, and what a row does not see is not
// even multiplied by 0. The one exception is the diagonal of a causal node: tile by tile, its rows see a part each.
// Lanes of a vector that the step does not concern keep what they have, bit for bit.
#include "dllm/draft_graph_attention.h"

#include "../thread_scratch.h"
#include "operands.h"
#include "panel.h"
#include "softmax_step.h"

extern "C" int omp_get_max_threads();

namespace dllm::cpu::DLLM_ISA {
namespace {

constexpr int32_t kTile = 64;  // of 32, 64 and 128 the fastest: a panel's scores and its query stay in the first cache
constexpr int32_t kMaxLanes = 1536;     // 11 nodes of 32 rows and 4 heads in one pass over the context
constexpr int32_t kItemsPerThread = 4;  // at least, if there are lanes enough: threads end together
constexpr int32_t kLanesAhead = 8;      // queries that are on their way while one is spread
constexpr int32_t kRowsAhead = 3;       // K/V to fetch per product: with 24 products per panel a tile arrives in time

static_assert(kMaxLanes % kPanelLanes == 0 && kTile % kTileRows == 0 && kRun % kTileRows == 0);

template <typename Stored>
inline void prefetch(const Stored* numbers, int32_t count) {
  constexpr int32_t kCacheLine = 64 / sizeof(Stored);
  for (int32_t i = 0; i < count; i += kCacheLine) {
    __builtin_prefetch(numbers + i);
  }
}

// A chunk's work, and the scratch of the thread that does it.
template <typename Operands>
class Chunk {
  using Number = typename Operands::Number;
  using Element = typename Number::Element;
  using Stored = typename Operands::Type::Stored;

 public:
  explicit Chunk(const DraftGraphAttentionArgs& args)
      : args_(args),
        group_size_(args.num_heads / args.num_kv_heads),
        depth_(args.head_dim / Operands::kPerElement),
        exponent_scale_(args.scale * kLog2E) {
    const int64_t query_bytes = sizeof(Element) * kMaxLanes * depth_;
    const int64_t out_bytes = sizeof(float) * kMaxLanes * args.head_dim;
    const int64_t state_bytes = sizeof(SoftmaxState<VecF>) * (kMaxLanes / kLanes);
    const int64_t tile_bytes = sizeof(Element) * kTile * depth_;
    const int64_t score_bytes = sizeof(float) * kTile * kPanelLanes;
    char* memory =
        static_cast<char*>(thread_scratch(query_bytes + out_bytes + state_bytes + 2 * tile_bytes + score_bytes));
    query_ = reinterpret_cast<Element*>(memory);
    out_ = reinterpret_cast<float*>(memory += query_bytes);
    state_ = reinterpret_cast<SoftmaxState<VecF>*>(memory += out_bytes);
    key_ = reinterpret_cast<Element*>(memory += state_bytes);
    value_ = reinterpret_cast<Element*>(memory += tile_bytes);
    scores_ = reinterpret_cast<float*>(memory += tile_bytes);
  }

  void run(int32_t request, int32_t kv_head, int32_t first_lane, int32_t max_lanes) {
    request_ = request;
    kv_head_ = kv_head;
    first_node_ = args_.first_node[request];
    last_node_ = args_.first_node[request + 1];
    first_lane_ = first_lane;
    const int32_t num_lanes = lane_of(args_.first_row[last_node_]);  // the request's, from this chunk on
    num_lanes_ = num_lanes < max_lanes ? num_lanes : max_lanes;
    if (num_lanes_ <= 0) {
      return;
    }
    begin();
    const Interval context = context_span();
    int32_t tile = context.begin / kTile * kTile;
    look_ahead({tile, tile + kTile});
    attend_own();
    for (; tile < context.end; tile += kTile) {
      look_ahead({tile + kTile, tile + 2 * kTile});
      attend_tile({tile, tile + kTile});
    }
    finish();
  }

 private:
  // The chunk's lane of a row's first head; before the chunk: negative.
  int32_t lane_of(int32_t row) const { return (row - args_.first_row[first_node_]) * group_size_ - first_lane_; }

  Interval lanes_of(int32_t node, int32_t node_end) const {
    return intersect({lane_of(args_.first_row[node]), lane_of(args_.first_row[node_end])}, {0, num_lanes_});
  }

  template <typename Pointer>
  Pointer lane_pointer(Pointer rows, RowStrides strides, int32_t lane) const {
    const int32_t row = args_.first_row[first_node_] + (first_lane_ + lane) / group_size_;
    const int32_t head = kv_head_ * group_size_ + (first_lane_ + lane) % group_size_;
    return rows + row * strides.row + head * strides.head;
  }

  void begin() {
    const auto* query = static_cast<const Stored*>(args_.query);
    for (int32_t lane = 0; lane < num_lanes_; ++lane) {
      const int32_t ahead = lane + kLanesAhead < num_lanes_ ? lane + kLanesAhead : lane;
      prefetch(lane_pointer(query, args_.query_strides, ahead), args_.head_dim);
      Element* to = query_ + (lane / kLanes) * depth_ * kLanes + lane % kLanes;
      Operands::spread(lane_pointer(query, args_.query_strides, lane), args_.head_dim, to);
    }
    const int32_t num_vecs = (num_lanes_ + kLanes - 1) / kLanes;
    for (int32_t vec = 0; vec < num_vecs; ++vec) {
      state_[vec] = {};
    }
    for (int64_t i = 0; i < int64_t{num_vecs} * args_.head_dim; ++i) {
      store(out_ + i * kLanes, VecF{});
    }
  }

  // From the first stored position that a lane sees to the last.
  Interval context_span() const {
    Interval span = {0x7FFFFFFF, 0};
    for (int32_t node = first_node_; node < last_node_; ++node) {
      for (const Interval& seen : args_.context[node].interval) {
        if (!is_empty(seen) && !is_empty(lanes_of(node, node + 1))) {
          span.begin = seen.begin < span.begin ? seen.begin : span.begin;
          span.end = seen.end > span.end ? seen.end : span.end;
        }
      }
    }
    return is_empty(span) ? Interval{} : span;
  }

  // Note what is seen of the tile that comes next.
  void look_ahead(Interval tile) {
    num_ahead_ = 0;
    for (int32_t node = first_node_; node < last_node_; ++node) {
      for (const Interval& seen : args_.context[node].interval) {
        for (Interval left = intersect(tile, seen); !is_empty(left); tile.begin = ++left.begin) {
          ahead_[num_ahead_++] = stored_row(left.begin);
        }
      }
    }
  }

  // Consecutive nodes of equal context share a step.
  void attend_tile(Interval tile) {
    Interval staged = {};
    for (int32_t node = first_node_, node_end; node < last_node_; node = node_end) {
      node_end = node + 1;
      while (node_end < last_node_ && is_same(args_.context[node], args_.context[node_end])) {
        ++node_end;
      }
      const Interval lanes = lanes_of(node, node_end);
      for (const Interval& seen : args_.context[node].interval) {
        const Interval segment = intersect(tile, seen);
        if (is_empty(segment) || is_empty(lanes)) {
          continue;
        }
        if (segment.begin != staged.begin || segment.end != staged.end) {
          stage_stored(segment);
          staged = segment;
        }
        attend(lanes, segment.end - segment.begin, WholeSegment{});
      }
    }
  }

  void attend_own() {
    for (int32_t node = first_node_; node < last_node_; ++node) {
      const Interval lanes = lanes_of(node, node + 1);
      const int32_t end = is_empty(lanes) ? 0 : args_.first_row[node + 1];
      for (int32_t row = args_.first_row[node]; row < end; row += kTile) {
        const Interval rows = intersect({row, row + kTile}, {0, end});
        if (args_.is_causal[node] == 0) {
          stage_own(rows);
          attend(lanes, rows.end - rows.begin, WholeSegment{});
        } else {
          attend_causal(rows, lanes);
        }
      }
    }
  }

  // Own rows of a causal node: lanes before them see none, lanes behind them all.
  void attend_causal(Interval rows, Interval lanes) {
    const Interval on_diagonal = intersect({lane_of(rows.begin), lane_of(rows.end)}, lanes);
    const Interval behind = intersect({lane_of(rows.end), lanes.end}, lanes);
    if (is_empty(on_diagonal) && is_empty(behind)) {
      return;
    }
    stage_own(rows);
    if (!is_empty(on_diagonal)) {
      attend(on_diagonal, rows.end - rows.begin, Diagonal{lane_of(rows.begin), group_size_});
    }
    if (!is_empty(behind)) {
      attend(behind, rows.end - rows.begin, WholeSegment{});
    }
  }

  void stage_stored(Interval positions) {
    const Stored* key[kTile];
    const Stored* value[kTile];
    for (int32_t position = positions.begin; position < positions.end; ++position) {
      const int32_t i = position - positions.begin;
      key[i] = stored_row(position);
      value[i] = key[i] + args_.head_dim;
    }
    stage(key, value, positions.end - positions.begin);
  }

  // While positions are in use, those of the next tile come nearer, a few between any two products.
  void prefetch_stored() {
    for (int32_t i = 0; i < kRowsAhead && num_ahead_ > 0; ++i) {
      prefetch(ahead_[--num_ahead_], 2 * args_.head_dim);
    }
  }

  const Stored* stored_row(int32_t position) const {
    const int64_t page = args_.page_table[request_ * args_.page_table_stride + position / args_.page_size];
    return static_cast<const Stored*>(args_.kv_cache) + page * args_.cache_page_stride +
           kv_head_ * args_.cache_head_stride + position % args_.page_size * args_.cache_position_stride;
  }

  void stage_own(Interval rows) {
    const Stored* key[kTile];
    const Stored* value[kTile];
    for (int32_t row = rows.begin; row < rows.end; ++row) {
      const RowStrides& k = args_.key_strides;
      const RowStrides& v = args_.value_strides;
      key[row - rows.begin] = static_cast<const Stored*>(args_.key) + row * k.row + kv_head_ * k.head;
      value[row - rows.begin] = static_cast<const Stored*>(args_.value) + row * v.row + kv_head_ * v.head;
    }
    stage(key, value, rows.end - rows.begin);
  }

  void stage(const Stored* const* key, const Stored* const* value, int32_t num_positions) {
    Operands::stage_keys(key, num_positions, args_.head_dim, key_, key_row_);
    Operands::stage_values(value, num_positions, args_.head_dim, value_, value_row_);
    for (int32_t i = num_positions; i % kTileRows != 0; ++i) {
      key_row_[i] = key_row_[0];  // its scores are computed and not used
    }
  }

  // One step of online softmax: the staged positions, of which each lane sees what `visible` says.
  template <typename Visible>
  void attend(Interval lanes, int32_t num_positions, Visible visible) {
    const int32_t end = (lanes.end + kLanes - 1) / kLanes;
    for (int32_t vec = lanes.begin / kLanes; vec < end; vec += kMaxVecs) {
      switch (end - vec) {
        case 1:
          attend_vecs<1>(vec, lanes, num_positions, visible);
          break;
        case 2:
          attend_vecs<2>(vec, lanes, num_positions, visible);
          break;
        default:
          attend_vecs<kMaxVecs>(vec, lanes, num_positions, visible);
      }
    }
  }

  template <int kVecs, typename Visible>
  void attend_vecs(int32_t first_vec, Interval lanes, int32_t num_positions, Visible visible) {
    const Panel<Element> query = {query_ + first_vec * depth_ * kLanes, kLanes, depth_ * kLanes};
    for (int32_t i = 0; i < num_positions; i += kTileRows) {
      prefetch_stored();
      tile_product<Number, kTileRows, kVecs>(Rows<Element>{key_row_ + i}, query, depth_,
                                             ScoreSums{scores_ + i * kPanelLanes});
    }
    VecI is_concerned[kVecs];
    for (int vec = 0; vec < kVecs; ++vec) {
      is_concerned[vec] = are_between((first_vec + vec) * kLanes, lanes.begin, lanes.end);
    }
    VecF factor[kVecs];
    const typename Visible::template Lanes<kVecs> seen(visible, first_vec);
    softmax_step<kVecs>(scores_, exponent_scale_, num_positions, is_concerned, seen, state_ + first_vec, factor);
    const int64_t depth = Operands::template pair_up<kVecs>(scores_, kPanelLanes, num_positions);
    const Panel<Element> weights = {reinterpret_cast<const Element*>(scores_), kPanelLanes, kLanes};
    const int64_t vec_stride = int64_t{args_.head_dim} * kLanes;
    for (int32_t i = 0; i < args_.head_dim; i += kTileRows) {
      prefetch_stored();
      float* out = out_ + first_vec * vec_stride + i * kLanes;
      tile_product<Number, kTileRows, kVecs>(Operands::values(value_, value_row_, args_.head_dim, i), weights, depth,
                                             OutSums<kVecs>{out, vec_stride, factor, is_concerned});
    }
  }

  void finish() {
    auto* out = static_cast<Stored*>(args_.out);
    for (int32_t lane = 0; lane < num_lanes_; ++lane) {
      const int32_t vec = lane / kLanes;
      const float max = state_[vec].max[lane % kLanes];
      const float sum = state_[vec].sum[lane % kLanes];
      const float* from = out_ + vec * args_.head_dim * kLanes + lane % kLanes;
      const float factor = normalizer(sum);
      Stored* to = lane_pointer(out, args_.out_strides, lane);
      for (int32_t dim = 0; dim < args_.head_dim; dim += kRun) {
        RunF run;
        for (int i = 0; i < kRun; ++i) {
          run[i] = from[(dim + i) * kLanes] * factor;
        }
        Operands::Type::store(to + dim, run);
      }
      if (args_.lse != nullptr) {
        *lane_pointer(args_.lse, {args_.num_heads, 1}, lane) = log_sum_exp(max, __builtin_log2f(sum));
      }
    }
  }

  const DraftGraphAttentionArgs& args_;
  const int32_t group_size_;
  const int64_t depth_;  // elements of a row of keys
  const float exponent_scale_;

  Element* query_;             // [num_vecs, depth, kLanes]
  float* out_;                 // [num_vecs, head_dim, kLanes]
  SoftmaxState<VecF>* state_;  // [num_vecs]
  Element* key_;               // [kTile, depth]; unused where the stored are elements
  Element* value_;             // [kTile / kPerElement, head_dim]
  float* scores_;              // [kTile, kPanelLanes]; then the weights, in elements

  int32_t request_ = 0;
  int32_t kv_head_ = 0;
  int32_t first_node_ = 0;
  int32_t last_node_ = 0;
  int32_t first_lane_ = 0;
  int32_t num_lanes_ = 0;
  int32_t num_ahead_ = 0;
  const Stored* ahead_[kTile];    // rows of the cache that are to come, the last first
  const void* key_row_[kTile];    // of the step, `depth_` elements each
  const void* value_row_[kTile];  // of the step, unless all are staged
};

// Lanes of a chunk: few enough to occupy all threads. No row's result depends on it.
int32_t choose_chunk_lanes(const DraftGraphAttentionArgs& args) {
  const int64_t num_lanes = int64_t{args.num_rows} * args.num_heads;
  const int64_t num_panels = num_lanes / (int64_t{kPanelLanes} * kItemsPerThread * omp_get_max_threads());
  return num_panels < kMaxLanes / kPanelLanes ? static_cast<int32_t>(num_panels + 1) * kPanelLanes : kMaxLanes;
}

template <typename Operands>
void attend_all(const DraftGraphAttentionArgs& args) {
  int32_t max_rows = 0;
  for (int32_t request = 0; request < args.num_requests; ++request) {
    const int32_t num_rows = args.first_row[args.first_node[request + 1]] - args.first_row[args.first_node[request]];
    max_rows = num_rows > max_rows ? num_rows : max_rows;
  }
  const int32_t chunk_lanes = choose_chunk_lanes(args);
  const int64_t max_lanes = int64_t{max_rows} * (args.num_heads / args.num_kv_heads);
  const int64_t num_chunks = (max_lanes + chunk_lanes - 1) / chunk_lanes;
  const int64_t num_items = num_chunks * args.num_kv_heads * args.num_requests;
#pragma omp parallel for schedule(dynamic)
  for (int64_t item = 0; item < num_items; ++item) {
    const auto chunk = static_cast<int32_t>(item % num_chunks);
    const int64_t pair = item / num_chunks;
    Chunk<Operands>(args).run(static_cast<int32_t>(pair / args.num_kv_heads),
                              static_cast<int32_t>(pair % args.num_kv_heads), chunk * chunk_lanes, chunk_lanes);
  }
}

}  // namespace

void draft_graph_attention(const DraftGraphAttentionArgs& args) {
  switch (args.type) {
    case FloatType::kFloat32:
      return attend_all<Floats<Float32>>(args);
    case FloatType::kFloat16:
      return attend_all<Floats<Float16>>(args);
    case FloatType::kBFloat16:
      return attend_all<BFloat16Operands>(args);
  }
}

}  // namespace dllm::cpu::DLLM_ISA
