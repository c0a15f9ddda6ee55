// Activations times two-bit weights on a CPU. native/library.py compiles this file for the machine it
// runs on.
//
// A tile is kTile output channels, one to a lane: its codes are transposed from rows of bytes to
// words [words][kTile], word i of a lane holding elements 16i .. 16i + 15 of its channel. A lane
// sums the elements of its channel in one fixed order, so that the bits of a product depend neither
// on the instruction set nor on how many rows, channels or threads there are.

#include "../native/pool.h"

namespace {

constexpr int kTile = kLanes * kVectors;
constexpr int kMicroRows = 4;      // rows of x multiplied at once
constexpr int kWordElements = 16;  // two-bit codes in a word
constexpr int kUnitWords = 4;      // words in 64 elements, of which K and groups are multiples
constexpr int kPairs = 8;          // pairs of elements in a word
constexpr int kBlockWords = 16;    // words transposed at once, and float products added in a row
constexpr int64_t kThreadBytes = 1 << 17;  // of codes times rows: less is not worth waking a thread

enum Mode : int64_t { kW2A16 = 0, kW2A8 = 1 };

// Words begin .. end of kTile rows of `row_words`, to out[end - begin][kTile]; may write up to
// kLanes words more.
void transpose_rows(const uint8_t* const* rows, int64_t begin, int64_t end, int64_t row_words,
                    uint32_t* out) {
  int64_t word = begin;
  for (; word < end && word + kLanes <= row_words; word += kLanes, out += kLanes * kTile) {
    for (int v = 0; v < kVectors; ++v) {
      transpose(rows + v * kLanes, 4 * word, out + v * kLanes, kTile);
    }
  }
  for (; word < end; ++word, out += kTile) {
    for (int i = 0; i < kTile; ++i) std::memcpy(out + i, rows[i] + 4 * word, 4);
  }
}

struct X {
  const uint8_t* data;  // [m, k]
  ffi::DataType type;
  int64_t m, k;
  int64_t units() const { return (k + 63) / 64; }
  int64_t words() const { return units() * kUnitWords; }
};

struct Weight {
  const uint8_t* codes;   // [n, words]
  const uint8_t* scales;  // [n, groups], or one if groups is 0
  ffi::DataType type;     // of the scales
  int64_t n, groups, group_words, first_tile;
  float* out;  // [m, n]
};

// A few rows of x, in the form that kernels read.
class Rows {
 public:
  static constexpr int kMost = 64;
  static int64_t most(Mode mode) { return mode == kW2A8 ? kMost : kMicroRows; }

  Buffer<float> tables;       // [rows][words][kPairs][16]
  Buffer<uint32_t> levels;    // [rows][words][4]: byte b of word j is the level of element 4b + j
  Buffer<uint32_t> before;    // [rows][units + 1]: the sum of the levels before a unit
  float steps[kMost];         // between levels

  void prepare(const X& x, Mode mode, int64_t begin, int64_t end) {
    int64_t words = x.words(), count = end - begin;
    float* row = row_.at_least(words * kWordElements);
    std::fill(row + x.k, row + words * kWordElements, 0.0f);
    if (mode == kW2A8) {
      levels.at_least(count * words * 4);
      before.at_least(count * (x.units() + 1));
    } else {
      tables.at_least(count * words * kPairs * 16);
    }
    for (int64_t m = 0; m < count; ++m) {
      to_floats(x.data + (begin + m) * x.k * bytes_of(x.type), x.type, x.k, row);
      if (mode == kW2A8) {
        steps[m] = quantize(row, x.units(), levels.data() + m * words * 4,
                            before.data() + m * (x.units() + 1));
      } else {
        tabulate(row, words * kPairs, tables.data() + m * words * kPairs * 16);
      }
    }
  }

 private:
  // Entry a + 4b of a pair's table is what it adds to a sum where its codes are a and b.
  static void tabulate(const float* x, int64_t pairs, float* out) {
    for (; pairs > 0; --pairs, x += 2, out += 16) {
      for (int i = 0; i < 16; ++i) {
        out[i] = static_cast<float>(i % 4 - 1) * x[0] + static_cast<float>(i / 4 - 1) * x[1];
      }
    }
  }

  // The bits of quantize_rows() in reference.py. Returns the step.
  float quantize(const float* x, int64_t units, uint32_t* out, uint32_t* before) {
    int64_t count = units * kUnitWords * kWordElements;
    uint32_t most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, bits_of<uint32_t>(x[i]) & 0x7fffffff);
    float absmax = bits_of<float>(most);
    bool finite = most < 0x7f800000, tiny = finite && absmax < 0x1p-100f;
    float inverse = finite && !tiny ? 127.0f / absmax : 0.0f;
    // Added to 1.5 * 2**23, a float is rounded to an integer that stands in its lowest bits.
    int8_t* q = row_levels_.at_least(count);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits = bits_of<uint32_t>(x[i] * inverse + 0x1.8p23f);
      q[i] = static_cast<int8_t>(finite ? bits & 255 : 0);
    }
    before[0] = 0;
    for (int64_t unit = 0; unit < units; ++unit) {
      int32_t sum = 0;
      for (int i = 0; i < 64; ++i) sum += q[unit * 64 + i];
      before[unit + 1] = before[unit] + static_cast<uint32_t>(sum);
    }
    for (int64_t word = 0; word < units * kUnitWords; ++word, out += 4) {
      uint32_t a[4];
      std::memcpy(a, q + word * kWordElements, sizeof a);
      uint32_t even = (a[0] & 0x00ff00ff) | (a[1] & 0x00ff00ff) << 8;
      uint32_t odd = (a[0] >> 8 & 0x00ff00ff) | (a[1] & 0xff00ff00);
      uint32_t even2 = (a[2] & 0x00ff00ff) | (a[3] & 0x00ff00ff) << 8;
      uint32_t odd2 = (a[2] >> 8 & 0x00ff00ff) | (a[3] & 0xff00ff00);
      out[0] = (even & 0xffff) | even2 << 16;
      out[1] = (odd & 0xffff) | odd2 << 16;
      out[2] = even >> 16 | (even2 & 0xffff0000);
      out[3] = odd >> 16 | (odd2 & 0xffff0000);
    }
    return !finite ? NAN : tiny ? 0.0f : absmax * (1.0f / 127.0f);
  }

  Buffer<float> row_;
  Buffer<int8_t> row_levels_;
};

// A part of a tile, and what its products with rows of x have come to.
struct Tile {
  int64_t units, words, group_words;
  int64_t begin, end;     // of the part, in words
  const uint32_t* codes;  // [end - begin][kTile]
  const float* scales;    // [groups][kTile]
  const uint8_t* next;    // the bytes that the next tile will read
  uint32_t* sums;         // [rows][kTile], of the group that the part ends in
  float* totals;          // [rows][kTile], of the groups before

  // Ask memory for the next tile while this one is worked on.
  void prefetch(int64_t word) const {
    for (int line = 0; line < kTile * 4 / kLine; ++line) {
      __builtin_prefetch(next + word * kTile * 4 + line * kLine, 0, 1);
    }
  }
};

// Float32 sum over groups of sum * scale, where sum is exact.
template <int kRows>
void multiply_w2a8(const Tile& t, Rows& rows, int64_t m) {
  const uint32_t* levels = rows.levels.data() + m * t.words * 4;
  const uint32_t* before = rows.before.data() + m * (t.units + 1);
  Ints sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(t.sums + (m + r) * kTile + v * kLanes);
  }
  for (int64_t i = t.begin; i < t.end;) {
    int64_t group = i / t.group_words, first = group * t.group_words;
    int64_t last = std::min(first + t.group_words, t.words);
    for (int64_t stop = std::min(last, t.end); i < stop; ++i) {
      const uint32_t* codes = t.codes + (i - t.begin) * kTile;
      t.prefetch(i);
      for (int j = 0; j < 4; ++j) {
        Ints field[kVectors];
        for (int v = 0; v < kVectors; ++v) field[v] = fields(load(codes + v * kLanes), j);
        for (int r = 0; r < kRows; ++r) {
          Ints four = fill(levels[(r * t.words + i) * 4 + j]);
          for (int v = 0; v < kVectors; ++v) sum[r][v] = dot(sum[r][v], field[v], four);
        }
      }
    }
    if (i < last) break;
    for (int r = 0; r < kRows; ++r) {
      // Codes are trits + 1.
      const uint32_t* b = before + r * (t.units + 1);
      Ints excess = fill(b[last / kUnitWords] - b[first / kUnitWords]);
      for (int v = 0; v < kVectors; ++v) {
        float* total = t.totals + (m + r) * kTile + v * kLanes;
        Floats scale = load(t.scales + group * kTile + v * kLanes);
        store(total, add(load(total), multiply(difference(sum[r][v], excess), scale)));
        sum[r][v] = fill(0u);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(t.sums + (m + r) * kTile + v * kLanes, sum[r][v]);
  }
}

// The same with float32 sums, of at most kBlockWords at a time.
template <int kRows>
void multiply_w2a16(const Tile& t, Rows& rows, int64_t m) {
  const float* tables = rows.tables.data() + m * t.words * kPairs * 16;
  for (int64_t i = t.begin; i < t.end;) {
    int64_t group = i / t.group_words;
    int64_t stop = std::min((group + 1) * t.group_words, t.end);
    Floats sum[kRows][kVectors];
    for (auto& row : sum) std::fill_n(row, kVectors, fill(0.0f));
    for (; i < stop; ++i) {
      const uint32_t* codes = t.codes + (i - t.begin) * kTile;
      t.prefetch(i);
      for (int p = 0; p < kPairs; ++p) {
        Ints index[kVectors];
        for (int v = 0; v < kVectors; ++v) index[v] = shift(load(codes + v * kLanes), 4 * p);
        for (int r = 0; r < kRows; ++r) {
          Table table(tables + ((r * t.words + i) * kPairs + p) * 16);
          for (int v = 0; v < kVectors; ++v) sum[r][v] = add(sum[r][v], table.at(index[v]));
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        float* total = t.totals + (m + r) * kTile + v * kLanes;
        Floats scale = load(t.scales + group * kTile + v * kLanes);
        store(total, add(load(total), multiply(sum[r][v], scale)));
      }
    }
  }
}

template <int kRows>
void multiply_rows(Mode mode, const Tile& t, Rows& rows, int64_t m) {
  mode == kW2A8 ? multiply_w2a8<kRows>(t, rows, m) : multiply_w2a16<kRows>(t, rows, m);
}

// What one thread works with.
class Worker {
 public:
  Rows rows;

  // The `count` prepared rows times channels n .. n + kTile, to out[m * w.n + n].
  void multiply(const X& x, Mode mode, const Weight& w, int64_t n, int64_t count, float* out) {
    int64_t channels = std::min<int64_t>(kTile, w.n - n), bytes = 4 * x.words();
    const uint8_t* codes[kTile];  // lanes beyond the last channel repeat it
    for (int64_t i = 0; i < kTile; ++i) {
      codes[i] = w.codes + (n + std::min(i, channels - 1)) * bytes;
    }
    uint32_t* part = codes_.at_least((kBlockWords + kLanes) * kTile);
    Tile t;
    t.units = x.units(), t.words = x.words(), t.group_words = w.group_words;
    t.codes = part;
    t.scales = load_scales(w, n, channels);
    t.next = w.codes + (n + kTile) * bytes;
    std::fill_n(t.sums = sums_.at_least(count * kTile), count * kTile, 0u);
    std::fill_n(t.totals = totals_.at_least(count * kTile), count * kTile, 0.0f);
    for (t.begin = 0; t.begin < t.words; t.begin = t.end) {
      // Whole groups, or a part of one.
      int64_t stop = t.group_words > kBlockWords
                         ? std::min((t.begin / t.group_words + 1) * t.group_words,
                                    t.begin + kBlockWords)
                         : t.begin + kBlockWords / t.group_words * t.group_words;
      t.end = std::min(stop, t.words);
      transpose_rows(codes, t.begin, t.end, t.words, part);
      for (int64_t m = 0; m < count; m += kMicroRows) {
        constexpr decltype(&multiply_rows<1>) kernels[] = {multiply_rows<1>, multiply_rows<2>,
                                                           multiply_rows<3>, multiply_rows<4>};
        kernels[std::min<int64_t>(kMicroRows, count - m) - 1](mode, t, rows, m);
      }
    }
    for (int64_t m = 0; m < count; ++m) {
      float step = mode == kW2A8 ? rows.steps[m] : 1.0f;
      for (int64_t i = 0; i < channels; ++i) out[m * w.n + n + i] = t.totals[m * kTile + i] * step;
    }
  }

 private:
  const float* load_scales(const Weight& w, int64_t n, int64_t channels) {
    if (w.groups == 0) {
      float* out = scales_.at_least(kTile);
      to_floats(w.scales, w.type, 1, out);
      std::fill_n(out + 1, kTile - 1, out[0]);
      return out;
    }
    int64_t padded = (w.groups + kLanes - 1) / kLanes * kLanes;
    float* raw = raw_scales_.at_least(padded * kTile);
    const uint8_t* rows[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      int64_t offset = (n + std::min(i, channels - 1)) * w.groups;
      to_floats(w.scales + offset * bytes_of(w.type), w.type, w.groups, raw + i * padded);
      rows[i] = reinterpret_cast<const uint8_t*>(raw + i * padded);
    }
    float* out = scales_.at_least(padded * kTile);
    transpose_rows(rows, 0, w.groups, padded, reinterpret_cast<uint32_t*>(out));
    return out;
  }

  Buffer<uint32_t> codes_, sums_;
  Buffer<float> scales_, raw_scales_, totals_;
};

// A call. Its units are the tiles of all weights, for one block of rows of x after the other.
struct Call {
  X x;
  Mode mode;
  std::vector<Weight> weights;
  int64_t tiles = 0;

  int64_t block_rows() const { return Rows::most(mode); }
  int64_t units() const { return tiles * ((x.m + block_rows() - 1) / block_rows()); }

  void add(Weight w) {
    w.first_tile = tiles;
    tiles += (w.n + kTile - 1) / kTile;
    weights.push_back(w);
  }
};

// What one thread does of a call.
class Tiles {
 public:
  explicit Tiles(const Call& call) : call_(call) {}

  void operator()(int64_t unit) {
    thread_local Worker worker;
    int64_t tile = unit % call_.tiles, block = unit / call_.tiles;
    int64_t begin = block * call_.block_rows();
    int64_t end = std::min(begin + call_.block_rows(), call_.x.m);
    if (block != prepared_) worker.rows.prepare(call_.x, call_.mode, begin, end);
    prepared_ = block;
    size_t which = call_.weights.size() - 1;
    while (call_.weights[which].first_tile > tile) --which;
    const Weight& w = call_.weights[which];
    int64_t n = (tile - w.first_tile) * kTile;
    worker.multiply(call_.x, call_.mode, w, n, end - begin, w.out + begin * w.n);
  }

 private:
  const Call& call_;
  int64_t prepared_ = -1;
};

// Arguments: x [m, k]; then of each weight its codes [(layers,) n, y], its scales alike, and which
// layer. Results: of each weight, float32 [m, n].
ffi::Error multiply_all(ffi::ThreadPool pool, int64_t mode, ffi::Span<const int64_t> group_sizes,
                        ffi::RemainingArgs args, ffi::RemainingRets results) {
  auto x_buffer = *args.get<ffi::AnyBuffer>(0);
  X x = {static_cast<const uint8_t*>(x_buffer.untyped_data()), x_buffer.element_type(),
         x_buffer.dimensions()[0], x_buffer.dimensions()[1]};
  auto call = std::make_shared<Call>(Call{x, static_cast<Mode>(mode), {}});
  int64_t work = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    auto codes = *args.get<ffi::AnyBuffer>(3 * i + 1);
    auto scales = *args.get<ffi::AnyBuffer>(3 * i + 2);
    auto layer = *args.get<ffi::AnyBuffer>(3 * i + 3);
    auto shape = codes.dimensions();
    int64_t layers = shape.size() == 3 ? shape[0] : 1;
    int64_t index = std::clamp<int64_t>(*layer.typed_data<int32_t>(), 0, layers - 1);
    Weight w;
    auto of_layer = [=](const ffi::AnyBuffer& stack) {
      int64_t bytes = static_cast<int64_t>(stack.size_bytes()) / layers;
      return static_cast<const uint8_t*>(stack.untyped_data()) + bytes * index;
    };
    w.codes = of_layer(codes);
    w.scales = of_layer(scales);
    w.type = scales.element_type();
    w.n = shape[shape.size() - 2];
    w.groups = group_sizes[i] ? scales.dimensions().back() : 0;
    w.group_words = group_sizes[i] ? group_sizes[i] / kWordElements : x.words();
    w.out = (*results.get<ffi::AnyBuffer>(i))->typed_data<float>();
    call->add(w);
    work += x.m * w.n * x.words() * 4;
  }
  int64_t threads = std::min<int64_t>(pool.num_threads(), work / kThreadBytes + 1);
  share(pool, call->units(), threads, [call] { return Tiles(*call); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NeurojaxGemm, multiply_all,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("mode")
                                  .Attr<ffi::Span<const int64_t>>("group_sizes")
                                  .RemainingArgs()
                                  .RemainingRets());
