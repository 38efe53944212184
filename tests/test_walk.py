"""What is read from machine code, and the walk through it: on fragments in nvdisasm's format."""

from __future__ import annotations

import struct

import pytest

from benchmarks.machine_code import Control, Program, local_name, programs, resources
from benchmarks.walk import GLOBAL_LATENCIES, Place, Walker, WalkError


def program(code: str) -> Program:
    """A program of instructions without addresses, and of labels."""
    lines, address = [".text.kernel:"], 0
    for line in code.strip().splitlines():
        if line.strip().endswith(":"):
            lines.append(line.strip())
        else:
            lines.append(f"        /*{address:04x}*/                   {line.strip()} ;")
            address += 16
    (found,) = programs("\n".join(lines))
    return found


def walk(code: str, thread: int = 0, block: int = 0, parameters: bytes = b"", **more: object):
    place = Place(thread, block, 128, 7, parameters)
    return Walker(program(code)).walk(place, **more)  # type: ignore[arg-type]


def integer(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little", signed=value < 0)


FROM_NVDISASM = """
.text._ZN4mghf4cuda40_GLOBAL__N__ca7e4b93_8_monce_cu_b7840fd513single_lossesENS0_8MatricesES2_Pf:
\t//## File "/a/folder/csrc/cuda/monce.cu", line 235
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000ff00000000800 */
\t//## File "/a/folder/csrc/cuda/device.h", line 12
        /*0010*/              @!P1 IMAD.IADD R0, R0.reuse, 0x1, -R7 ;     /* 0x0000000100009824 */
                                                                          /* 0x001fca00078e0a07 */
.L_x_1:
        /*0020*/                   BRX R4 -0x30 (*"BRANCH_TARGETS .L_x_1,.L_x_1"*);
        /*0030*/               @P0 BRA `(.L_x_1) ;
"""


def test_instructions_with_their_lines_and_control_words() -> None:
    (found,) = programs(FROM_NVDISASM)
    load, add, table, jump = found.instructions
    assert local_name(found.name) == "13single_lossesENS0_8MatricesES2_Pf"
    assert found.labels == {".L_x_1": 2}
    assert (load.mnemonic, load.operands) == ("LDC", ("R1", "c[0x0][0x28]"))
    assert load.line == "monce.cu:235" and add.line == "device.h:12"
    assert load.control == Control(stall=8, written=7, read=7, waits=0)
    assert add.control == Control(stall=5, written=7, read=7, waits=1)
    assert (add.guard, add.suffixes) == ("!P1", ("IADD",))
    assert add.operands == ("R0", "R0", "0x1", "-R7")
    assert table.target == jump.target == ".L_x_1" and jump.control == Control()


def test_resources_of_a_kernel() -> None:
    log = """ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Used 168 registers, used 1 barriers, 4112 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Used 40 registers"""
    assert {k: tuple(vars(v).values()) for k, v in resources(log).items()} == {
        "first": (168, 4112),
        "second": (40, 0),
    }


LOOP = """
    S2R R0, SR_TID.X
    LDC R2, c[0x0][0x210]
.L_x_0:
    ISETP.GE.AND P0, PT, R0, R2, PT
    @P0 BRA `(.L_x_1)
    FFMA R4, R5, R6, R4
    IADD3 R0, R0, 0x20, RZ
    BRA `(.L_x_0)
.L_x_1:
    EXIT
"""


@pytest.mark.parametrize(("thread", "end", "times"), [(0, 100, 4), (5, 100, 3), (0, -1, 0)])
def test_a_loop_ends_where_the_parameter_says(thread: int, end: int, times: int) -> None:
    found = walk(LOOP, thread, parameters=integer(end))
    assert found.ended and not found.unknown
    assert found.counts["FFMA"] == times and found.counts["ISETP.GE.AND"] == times + 1
    assert found.reached == len(program(LOOP).instructions) - (0 if times else 3)


# n / d as nvcc writes it: by the reciprocal in float32, and two corrections.
DIVISION = """
    LDC R6, c[0x0][0x210]
    LDC R5, c[0x0][0x214]
    I2F.U32.RP R4, R5
    ISETP.NE.U32.AND P2, PT, R5, RZ, PT
    MUFU.RCP R4, R4
    VIADD R2, R4, 0xffffffe
    F2I.FTZ.U32.TRUNC.NTZ R3, R2
    IMAD.MOV.U32 R2, RZ, RZ, RZ
    IMAD.MOV R7, RZ, RZ, -R3
    IMAD R7, R7, R5, RZ
    IMAD.HI.U32 R3, R3, R7, R2
    IMAD.HI.U32 R0, R3, R6, RZ
    IMAD.MOV R3, RZ, RZ, -R0
    IMAD R3, R5, R3, R6
    ISETP.GE.U32.AND P0, PT, R3, R5, PT
    @P0 IMAD.IADD R3, R3, 0x1, -R5
    @P0 VIADD R0, R0, 0x1
    ISETP.GE.U32.AND P1, PT, R3, R5, PT
    @P1 VIADD R0, R0, 0x1
.L_x_0:
    ISETP.NE.AND P0, PT, R0, RZ, PT
    VIADD R0, R0, 0xffffffff
    @P0 BRA `(.L_x_0)
    EXIT
"""


@pytest.mark.parametrize(("n", "d"), [(1000, 7), (6, 7), (441, 21), (2**31, 2**21 + 1)])
def test_divisions_of_integers(n: int, d: int) -> None:
    found = walk(DIVISION, parameters=integer(n) + integer(d))
    assert found.counts["BRA"] == n // d + 1 and not found.unknown


# Loops of which the number of passes is the value of an expression, in R0.
COUNT = """
.L_x_0:
    ISETP.GT.AND P0, PT, R0, RZ, PT
    IADD3 R0, R0, -0x1, RZ
    @P0 BRA `(.L_x_0)
    EXIT
"""


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("LEA R0, R0, 0x3, 0x2", 5 * 4 + 3),
        ("LEA.HI R0, R0, RZ, RZ, 0x1f", 2),
        ("SHF.R.S32.HI R0, RZ, 0x1, R0", 2),
        ("SHF.L.U32 R0, R0, 0x2, RZ", 20),
        ("LOP3.LUT R0, R0, 0x6, RZ, 0xc0, !PT", 4),
        ("LOP3.LUT R0, R0, 0x2, RZ, 0x96, !PT", 7),
        ("VIMNMX R0, R0, 0x3, PT", 3),
        ("VIMNMX R0, R0, 0x9, !PT", 9),
        ("VIADDMNMX R0, R0, -0x2, 0x1, !PT", 3),
        ("IMAD R0, R0, 0x3, R0", 20),
        ("IADD3 R0, -R0, 0x9, RZ", 4),
        ("IADD3 R2, P0, R0, -0x5, RZ\nIADD3.X R0, RZ, 0x6, RZ, P0, !PT", 7),  # 5 - 5: a carry
        ("IADD3 R2, P0, R0, -0x6, RZ\nIADD3.X R0, RZ, 0x6, RZ, P0, !PT", 6),
        ("IMAD.WIDE.U32 R2, R0, 0x40000000, RZ\nMOV R0, R3", 1),
        ("IMAD.WIDE R2, R0, -0x1, RZ\nIADD3 R0, -R3, RZ, RZ", 1),
        ("PRMT R0, R0, 0x7610, RZ", 5),
        ("ISETP.LT.U32.AND P1, PT, R0, -0x1, PT\nSEL R0, R0, RZ, !P1", 0),
        ("ISETP.EQ.AND P1, PT, R0, 0x5, PT\nISETP.GE.AND.EX P1, PT, RZ, RZ, PT, P1\n"
         "SEL R0, 0x2, 0x1, P1", 2),
        ("ISETP.EQ.AND P1, P2, R0, 0x5, PT\nPLOP3.LUT P3, PT, P1, P2, PT, 0x80, 0x0\n"
         "SEL R0, 0x2, 0x1, P3", 1),
        ("STS [R0+0x10], R0\nMOV R0, RZ\nLDS R0, [0x15]", 5),
        ("STL.64 [R1], R0\nMOV R0, RZ\nLDL R0, [R1]", 5),
        ("ULDC UR4, c[0x0][0x210]\nUIADD3 UR4, UR4, 0x2, URZ\nMOV R0, UR4", 7),
        ("HFMA2.MMA R0, -RZ, RZ, 0, 5.9604644775390625e-08", 1),
        ("SHFL.IDX PT, R0, R0, RZ, 0x1f", 5),
        ("REDUX.MAX UR0, R0\nMOV R0, UR0", 5),
        ("R2P PR, R0, 0x7\nSEL R0, 0x4, 0x3, P2", 4),
        ("ISETP.EQ.AND P3, PT, R0, 0x5, PT\nP2R R0, PR, RZ, 0x8", 8),
    ],
)  # fmt: skip
def test_integers_are_computed(code: str, value: int) -> None:
    found = walk(f"LDC R0, c[0x0][0x210]\n{code}\n{COUNT}", parameters=integer(5))
    assert found.counts["BRA"] == value + 1 and not found.unknown


def test_64_bits_of_a_pointer_and_small_constants() -> None:
    code = """
        ULDC.64 UR4, c[0x0][0x210]
        UISETP.NE.U32.AND UP0, UPT, UR4, URZ, UPT
        UISETP.NE.AND.EX UP0, UPT, UR5, URZ, UPT, UP0
        LDC.U8 R0, c[0x0][0x21a]
        @!UP0 EXIT
    """
    for pointer, passes in ((0, 0), (1 << 33, 1)):
        parameters = integer(pointer, 8) + integer(0x30201)
        found = walk(code + COUNT, parameters=parameters)
        assert found.counts["BRA"] == passes * 4


def test_calls_return() -> None:
    code = """
        MOV R0, 0x2
        CALL.REL.NOINC `($kernel$twice)
        CALL.REL.NOINC `($kernel$twice)
        BRA `(.L_x_0)
    $kernel$twice:
        IADD3 R0, R0, R0, RZ
        RET.REL.NODEC R2 `(kernel)
    """
    assert walk(code + COUNT).counts["BRA"] == 8 + 1 + 1


UNKNOWN = """
    LDG.E R2, desc[UR4][R4.64]
    FSETP.GT.AND P0, PT, R2, RZ, PT
    @P0 BRA `(.L_x_1)
    MUFU.EX2 R3, R3
.L_x_1:
    FADD R2, R2, R2
    @!P0 BRA `(.L_x_1)
    EXIT
"""


def test_what_depends_on_data_is_decided_by_a_rule_and_reported() -> None:
    found = walk(UNKNOWN)
    assert found.counts["MUFU.EX2"] == 0 and found.counts["FADD"] == 1
    assert found.unknown == {0x20: 1, 0x50: 1}
    three = walk(UNKNOWN, rule=lambda program, jump, known, times: "!" in jump.guard and times < 2)
    assert three.counts["MUFU.EX2"] == 1 and three.counts["FADD"] == 3


def test_predicates_are_kept_in_bits_though_one_is_unknown() -> None:
    code = """
        LDC R0, c[0x0][0x210]
        FSETP.GT.AND P0, PT, R9, R8, PT
        ISETP.EQ.AND P1, PT, R0, 0x5, PT
        LOP3.LUT R7, R7, 0xfffffffc, RZ, 0xc0, !PT
        @P0 LOP3.LUT R7, R7, 0x1, RZ, 0xfc, !PT
        @P1 LOP3.LUT R7, R7, 0x2, RZ, 0xfc, !PT
        LOP3.LUT P2, RZ, R7, 0x2, RZ, 0xc0, !PT
        SEL R0, 0x2, 0x1, P2
    """
    found = walk(code + COUNT, parameters=integer(5))
    assert found.counts["BRA"] == 3 and not found.unknown


def test_bytes_of_a_warp() -> None:
    code = """
        ISETP.EQ.AND P0, PT, R0, 0x1, PT
        LDG.E.128 R4, desc[UR4][R2.64+0x10]
        @P0 LDG.E R4, desc[UR4][R2.64]
        @!P0 STG.E.U16 desc[UR4][R2.64], R4
        LDSM.16.M88.4 R4, [R2]
        ATOMS.POPC.INC.32 RZ, [R2+URZ]
        EXIT
    """
    assert walk(code).bytes == {
        "global load": 512, "global store": 64, "shared load": 512, "shared atomic": 128,
    }  # fmt: skip


def test_bulk_copies_and_products_of_a_warpgroup() -> None:
    code = """
        ULDC UR7, c[0x0][0x210]
        ELECT P2, URZ, PT
    .L_x_0:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6+0x80], R7
        @!P0 BRA `(.L_x_0)
        @P2 UBLKCP.S.G [UR10], [UR4], UR7
        UBLKCP.S.G [UR10], [UR4], UR7
        HGMMA.64x32x16.F32 R24, R40, gdesc[UR4], R24, gsb0
        HGMMA.64x32x16.F32 R24, R40, gdesc[UR4], R24, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x1
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        EXIT
    """
    found = walk(code, parameters=integer(4096))
    assert found.bytes["global load"] == 2 * 4096 and not found.unknown
    assert found.cycles == (6 + 2 * 16 + 2, 6 + 2 * 16 + 2)


def test_a_loop_without_end() -> None:
    with pytest.raises(WalkError, match="kernel has executed"):
        walk(".L_x_0:\nBRA `(.L_x_0)", most=1000)


def word(stall: int, written: int = 7, waits: int = 0) -> str:
    high = (stall | written << 5 | 7 << 8 | waits << 11) << 41
    return f"/* 0x{0:016x} */\n    /* 0x{high:016x} */"


def test_time_waits_for_scoreboards() -> None:
    text = f"""
.text.kernel:
        /*0000*/    LDG.E R2, desc[UR4][R4.64] ; {word(2, written=0)}
        /*0010*/    LDS R3, [R6] ;  {word(1, written=1)}
        /*0020*/    FADD R6, R6, R6 ; {word(4, waits=0b10)}
        /*0030*/    FADD R2, R2, R3 ; {word(4, waits=0b01)}
        /*0040*/    EXIT ; {word(5)}
"""
    (found,) = programs(text)
    cycles = Walker(found).walk(Place(0, 0, 32, 1, b"")).cycles
    assert cycles == tuple(latency + 4 + 5 for latency in GLOBAL_LATENCIES)


def test_comparisons_of_float_parameters() -> None:
    code = """
        ULDC UR4, c[0x0][0x210]
        FSETP.GT.AND P1, PT, RZ, UR4, PT
        FSETP.LEU.AND P2, P3, R0, 0.5, !P1
        FSETP.GT.OR P4, PT, |R9|, RZ, PT
        SEL R0, 0x3, 0x1, P2
        @P3 MOV R0, 0x7
    """
    for half, passes in ((-0.5, 1), (0.5, 3), (0.75, 7)):
        parameters = struct.pack("<f", half)
        found = walk("LDC R0, c[0x0][0x210]\n" + code + COUNT, parameters=parameters)
        assert found.counts["BRA"] == passes + 1 and not found.unknown
