"""Which emoji are in the data set, and what captions call them: Unicode's names, in lower case.

What is kept has a shape of its own, which a small model can learn and anyone can name. Left out:
flags, signs and letters, clocks, variants by skin and gender, most faces and people, and of things
that look alike all but one.
"""

from collections.abc import Mapping
from typing import Any

# Groups of which nearly everything is kept, and what is not.
ALL_BUT = {
    "Animals & Nature": """
        badger, beetle, bison, black bird, black cat, blossom, boar, bug, chipmunk, cockroach,
        coral, cow, cricket, dodo, donkey, dragon face, empty nest, ewe, fallen leaf, fly,
        front-facing baby chick, goose, guide dog, hamster, herb, horse face, hyacinth, leaf
        fluttering in wind, leopard, lizard, lotus, mammoth, microbe, monkey face, moose,
        mosquito, mouse, nest with eggs, orangutan, otter, ox, oyster, paw prints, pig, pig nose,
        poodle, ram, rat, rosette, service dog, shamrock, sheaf of rice, squid, tiger, two-hump
        camel, water buffalo, whale, white flower, wilted flower, wing, worm
    """,
    "Food & Drink": """
        amphora, baby bottle, bagel, beans, bento box, beverage box, bowl with spoon, burrito,
        butter, canned food, chestnut, chopsticks, clinking beer mugs, clinking glasses, cooked
        rice, cup with straw, curry rice, custard, cut of meat, dango, dumpling, falafel, fish
        cake with swirl, flatbread, fondue, fork and knife, fortune cookie, fried shrimp, ginger
        root, jar, leafy green, mango, mate, melon, moon cake, oden, olive, pot of food, pouring
        liquid, rice cracker, roasted sweet potato, sake, salt, shallow pan of food, shaved ice,
        stuffed flatbread, tamale, teacup without handle, tropical drink, tumbler glass
    """,
}

# Groups of which only these are kept.
ONLY = {
    "Smileys & Emotion": """
        grinning face, face with tears of joy, winking face, smiling face with halo, smiling face
        with heart-eyes, star-struck, thinking face, neutral face, sleeping face, face with
        medical mask, nauseated face, hot face, cold face, exploding head, cowboy hat face,
        partying face, smiling face with sunglasses, nerd face, loudly crying face, enraged face,
        smiling face with horns, skull, pile of poo, clown face, ghost, alien, alien monster,
        robot, see-no-evil monkey, red heart, green heart, blue heart, purple heart, broken heart,
        kiss mark
    """,
    "People & Body": """
        waving hand, thumbs up, flexed biceps, brain, tooth, bone, eyes, baby, cook, astronaut,
        firefighter, police officer, ninja, princess, Santa Claus, mermaid
    """,
    "Travel & Places": """
        globe showing Americas, snow-capped mountain, volcano, beach with umbrella, desert island,
        house, hospital, factory, castle, Statue of Liberty, church, mosque, shinto shrine,
        fountain, tent, bridge at night, playground slide, ferris wheel, roller coaster, circus
        tent, locomotive, bullet train, bus, ambulance, fire engine, police car, taxi, automobile,
        delivery truck, tractor, racing car, motorcycle, motor scooter, bicycle, skateboard,
        roller skate, vertical traffic light, anchor, ring buoy, sailboat, speedboat, passenger
        ship, airplane, parachute, helicopter, rocket, flying saucer, luggage, hourglass done,
        alarm clock, full moon, crescent moon, sun, sun with face, ringed planet, star, cloud, sun
        behind cloud, cloud with lightning and rain, tornado, rainbow, umbrella, high voltage,
        snowflake, snowman, fire, droplet, water wave
    """,
    "Activities": """
        jack-o-lantern, Christmas tree, fireworks, balloon, party popper, wrapped gift, trophy,
        sports medal, soccer ball, baseball, basketball, volleyball, american football, tennis,
        bowling, ping pong, boxing glove, ice skate, diving mask, bullseye, yo-yo, kite, crystal
        ball, magic wand, video game, joystick, game die, puzzle piece, teddy bear, chess pawn,
        artist palette, thread, yarn
    """,
    "Objects": """
        glasses, sunglasses, t-shirt, jeans, scarf, gloves, socks, dress, handbag, backpack,
        running shoe, hiking boot, high-heeled shoe, crown, top hat, graduation cap, billed cap,
        lipstick, ring, gem stone, megaphone, bell, microphone, headphone, radio, saxophone,
        trumpet, accordion, guitar, musical keyboard, violin, drum, mobile phone, telephone,
        battery, laptop, floppy disk, clapper board, television, camera, magnifying glass tilted
        left, candle, light bulb, flashlight, open book, books, scroll, coin, money bag, envelope,
        package, pencil, paintbrush, crayon, briefcase, pushpin, scissors, locked, key, hammer,
        axe, crossed swords, bomb, bow and arrow, shield, carpentry saw, wrench, screwdriver,
        gear, magnet, ladder, dna, microscope, telescope, syringe, pill, door, mirror, bed, chair,
        toilet, bathtub, broom, basket, bucket, soap, toothbrush, fire extinguisher, shopping
        cart, moai
    """,
}

# Where one says something shorter, or the only one left needs no telling apart.
RENAMED = {
    "T-Rex": "t-rex",
    "automobile": "car",
    "cheese wedge": "cheese",
    "cow face": "cow",
    "deciduous tree": "tree",
    "ear of corn": "corn",
    "enraged face": "angry face",
    "globe showing Americas": "globe",
    "headphone": "headphones",
    "high voltage": "lightning bolt",
    "honeybee": "bee",
    "hot beverage": "hot coffee",
    "hourglass done": "hourglass",
    "lady beetle": "ladybug",
    "locked": "padlock",
    "loudly crying face": "crying face",
    "magnifying glass tilted left": "magnifying glass",
    "mouse face": "mouse",
    "passenger ship": "ship",
    "pig face": "pig",
    "pile of poo": "poo",
    "spouting whale": "whale",
    "thread": "spool of thread",
    "tiger face": "tiger",
    "vertical traffic light": "traffic light",
    "water wave": "wave",
    "wrapped gift": "gift",
}


def vocabulary(emoji: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The chosen emoji and their names, from all emoji with what Unicode says of each."""
    chosen = {}
    for char, about in emoji.items():
        name, group = about["name"], about["group"]
        if name in listed(ONLY.get(group, "")) or (
            group in ALL_BUT and name not in listed(ALL_BUT[group])
        ):
            chosen[char] = RENAMED.get(name, name).lower()
    return chosen


def listed(names: str) -> list[str]:
    return " ".join(names.split()).split(", ")
