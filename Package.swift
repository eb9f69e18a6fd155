// swift-tools-version: 6.1
import Foundation
import PackageDescription

// The Makefile names the CPU level; "haswell" (x86-64-v3) is the base that every build must run on.
let cpu = Context.environment["FASTERMOE_CPU"] ?? "haswell"
let wide = cpu == "skylake-avx512"
#if arch(x86_64)
  let level = ["-Xcc", "-march=\(cpu)", "-target-cpu", cpu]
#else
  let level: [String] = []
#endif
// The tile kernels are loops over constant counts; they only become registers when all of them are unrolled.
let core: [SwiftSetting] =
  [.unsafeFlags(level + ["-Xllvm", "-unroll-threshold=3000"])]
  + (wide ? [.define("WIDE_VECTORS")] : [])

// Neither the library nor the tool needs Swift where it runs.
let standalone = [
  "-static-stdlib", "-Xlinker", "--gc-sections", "-l_FoundationCShims", "-l_FoundationCollections",
  "-lswiftSynchronization",
]

// Allocations of the library and of the runtime in it go through Sources/CAPI/Allocation.swift.
let wrapped = [
  "malloc", "calloc", "realloc", "posix_memalign", "_Znwm", "_ZnwmSt11align_val_t", "__sched_cpualloc",
].flatMap { ["-Xlinker", "--wrap=\($0)"] }

let package = Package(
  name: "FasterMoE",
  // Products of a package cannot share a name: the tool is installed as `fastermoe`.
  products: [
    .library(name: "fastermoe", type: .dynamic, targets: ["CAPI"]),
    .executable(name: "fastermoe-tool", targets: ["ToolMain"]),
  ],
  dependencies: [.package(url: "https://github.com/apple/swift-argument-parser", from: "1.5.0")],
  targets: [
    .systemLibrary(name: "CFasterMoE", path: "include"),
    .systemLibrary(name: "CHwloc", pkgConfig: "hwloc", providers: [.apt(["libhwloc-dev"])]),
    .systemLibrary(name: "CHints"),
    .target(name: "FasterMoE", dependencies: ["CHints", "CHwloc"], swiftSettings: core),
    .target(
      name: "CAPI", dependencies: ["FasterMoE", "CFasterMoE", "CHints"], exclude: ["exports.map"], swiftSettings: core,
      linkerSettings: [
        .unsafeFlags(
          standalone + wrapped + [
            "-Xlinker", "--version-script=\(Context.packageDirectory)/Sources/CAPI/exports.map",
            "-Xlinker", "-soname=libfastermoe.so.0", "-Xlinker", "-z", "-Xlinker", "nodelete",
          ])
      ]),
    .target(
      name: "Tool", dependencies: ["FasterMoE", .product(name: "ArgumentParser", package: "swift-argument-parser")],
      swiftSettings: core),
    .executableTarget(
      name: "ToolMain", dependencies: ["Tool", "CHints"], swiftSettings: core,
      linkerSettings: [.unsafeFlags(standalone)]),
    // For `make choices` alone.
    .executableTarget(name: "Choose", dependencies: ["FasterMoE"], swiftSettings: core),
    .testTarget(name: "FasterMoETests", dependencies: ["FasterMoE", "CHints"], swiftSettings: core),
    .testTarget(name: "ToolTests", dependencies: ["Tool", "FasterMoE"], swiftSettings: core),
  ]
)
